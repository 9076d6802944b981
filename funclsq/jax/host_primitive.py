"""A host function as an operation of a compiled CPU program, called with bare buffers.

``jax.experimental.buffer_callback`` names the same operation, and rebuilds pytrees around the
buffers at every call: 5 us where nothing else runs, about 30 us after a solve that has filled the
caches. Which operation it names is no public matter. So it is named here only for versions of JAX
with which this was tested, and where its parts are found; everywhere else the public way is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

__all__ = ["bare_call", "usable"]

TESTED = ((0, 10),)  # versions of JAX, (major, minor)
_TARGET = "xla_buffer_python_cpu_callback"

Function = Callable[..., tuple[()]]

call_p = Primitive("funclsq_host_call")
call_p.multiple_results = True


def usable() -> bool:
    """Whether this JAX is one with which it was tested."""
    known = jax.__version_info__[:2] in TESTED
    return known and hasattr(mlir.ModuleContext, "add_host_callback") and hasattr(jax, "ffi")


def bare_call(
    function: Function, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any]
) -> tuple[Any, ...]:
    """Call ``function(context, *inputs, *outputs)``, which returns (), on JAX's buffers."""
    shapes = tuple((tuple(r.shape), np.dtype(r.dtype)) for r in results)
    return tuple(call_p.bind(*operands, function=function, shapes=shapes))


@call_p.def_abstract_eval
def _abstract(*operands, function, shapes):
    del operands, function
    return [ShapedArray(shape, dtype) for shape, dtype in shapes]


def _lower(ctx, *operands, function, shapes):
    del shapes
    module = ctx.module_context
    if len(module.platforms) > 1:
        raise NotImplementedError(
            "funclsq.jax: a host call must be lowered for one platform; got "
            f"{', '.join(module.platforms)}. Lower for one of them, platforms=['cpu'] for example."
        )
    module.add_host_callback(function)
    index = np.uint64(len(module.host_callbacks) - 1)
    return jax.ffi.ffi_lowering(_TARGET)(ctx, *operands, index=index)


mlir.register_lowering(call_p, _lower, platform="cpu")
