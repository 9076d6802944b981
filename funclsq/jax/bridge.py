"""How torch code runs inside a JAX program: one host call per solve, on JAX's own buffers.

On the CPU the call goes through ``jax.experimental.buffer_callback``, or straight to the operation
that it names (``host_primitive``). The host function gets the memory of JAX's arrays as torch
tensors (DLPack, no copy) and writes its results into the memory that XLA has set aside for them.
Where that mechanism is missing, or the platform is not a CPU, ``jax.pure_callback`` is used, which
copies; that is announced once by a warning.

Rules that every host function keeps:

- it never calls JAX (the runtime may be waiting for it: a deadlock);
- it never writes to an input, and keeps no view of a buffer after it returns;
- it may be called from any thread, and from several at once.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from funclsq.errors import FunclsqWarning
from funclsq.jax.host_primitive import bare_call, usable
from funclsq.jax.settle import begun, closing, lowered, running

try:
    from jax.experimental.buffer_callback import buffer_callback
except ImportError:  # pragma: no cover - an older or a future JAX
    buffer_callback = None

__all__ = ["host_call", "mechanism"]

Host = Callable[[Sequence[Tensor], Sequence[Tensor]], None]

# What from_dlpack calls for a capsule, without its look at what it was given.
_view = getattr(torch._C, "_from_dlpack", from_dlpack)

SMALL = 1 << 20  # operands below this many bytes in all run on one torch thread

_announced = False


def mechanism(platform: str = "cpu") -> str:
    """Name of the mechanism that host calls use on ``platform``."""
    return "buffer_callback" if buffer_callback and platform == "cpu" else "pure_callback"


def host_call(
    host: Host, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any], how: str
) -> tuple[Any, ...]:
    """Call ``host(outputs, inputs)`` on torch views of JAX's buffers.

    Parameters
    ----------
    host : callable
        Writes every output in place; returns nothing.
    results : sequence of ShapeDtypeStruct
        Shapes and dtypes of the outputs.
    operands : sequence of array
        The inputs.
    how : {"buffer_callback", "pure_callback"}
        The mechanism, see :func:`mechanism`.

    Returns
    -------
    tuple of array
        The outputs.
    """
    lowered()
    results = tuple(results)
    small = sum(math.prod(t.shape) * t.dtype.itemsize for t in (*operands, *results)) < SMALL
    if how == "buffer_callback":
        function = functools.partial(_on_buffers, host, small, len(operands))
        if usable():
            return bare_call(function, results, operands)
        call = buffer_callback(functools.partial(_unpacked, function), results)
        return tuple(call(*operands))
    _announce()
    return tuple(
        jax.pure_callback(functools.partial(_on_copies, host, small, results), results, *operands)
    )


def _on_buffers(host: Host, small: bool, count: int, _: Any, *buffers: Any) -> tuple[()]:
    """Call the host function on views of ``count`` inputs and of the outputs after them."""
    views = [_view(b.__dlpack__()) for b in buffers]
    _run(host, small, views[count:], views[:count])
    return ()


def _unpacked(function: Any, context: Any, outputs: Sequence[Any], *inputs: Any) -> None:
    function(context, *inputs, *outputs)


def _on_copies(host: Host, small: bool, results: Any, *inputs: Any) -> tuple[np.ndarray, ...]:
    arrays = tuple(np.empty(r.shape, r.dtype) for r in results)
    views = [torch.from_numpy(np.require(a, requirements=["C", "A", "W"])) for a in inputs]
    _run(host, small, [torch.from_numpy(a) for a in arrays], views)
    return arrays


def _run(host: Host, small: bool, targets: list[Tensor], views: list[Tensor]) -> None:
    """Run the host function, counted, and on one torch thread if the problem is small.

    Waking more threads costs more than they save there; the setting is this thread's own.
    """
    threads = torch.get_num_threads() if small else 1
    next(begun)
    running.append(None)
    try:
        if closing:
            raise RuntimeError("funclsq.jax: the interpreter is shutting down")
        if threads > 1:
            torch.set_num_threads(1)
        host(targets, views)
    finally:
        if threads > 1:
            torch.set_num_threads(threads)
        running.pop()


def _announce() -> None:
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(
            "funclsq.jax: jax.experimental.buffer_callback cannot be used here (it is missing "
            "from this JAX, or the platform is not a CPU); falling back to jax.pure_callback, "
            "which copies every operand. Results are the same.",
            FunclsqWarning,
            stacklevel=2,
        )
