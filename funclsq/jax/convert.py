"""Arrays between torch and JAX: shared memory where that is possible, never a lost bit.

Sharing is a promise that nobody writes: JAX arrays are immutable, and XLA may read them at any
time. A torch tensor that is written to after :func:`from_torch`, or the result of
:func:`to_torch` written to at all, changes arrays that JAX takes to be constant. Pass
``copy=True`` where either may happen.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

__all__ = ["from_torch", "to_torch"]

_TO_JAX = {
    torch.bool: np.bool_,
    torch.uint8: np.uint8,
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.uint64: np.uint64,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float16: np.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}
_TO_TORCH = {np.dtype(v): k for k, v in _TO_JAX.items()}


def require_representable(dtype: Any, what: str) -> None:
    """Raise a TypeError if JAX would silently narrow this dtype (x64 is off)."""
    dtype = np.dtype(dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        narrow = jax.dtypes.canonicalize_dtype(dtype)
        raise TypeError(
            f"{what} is {dtype} but jax_enable_x64 is off, so JAX would make it {narrow}. Enable "
            f'it with jax.config.update("jax_enable_x64", True), or convert it to {narrow} '
            "yourself."
        )


def jax_array(t: Any, what: str) -> Any:
    """``jnp.asarray`` that refuses to narrow an array of NumPy's, see require_representable."""
    if isinstance(t, np.ndarray) and t.dtype.kind in "fc":
        require_representable(t.dtype, what)
    return jnp.asarray(t)


def from_torch(t: Tensor, *, dtype: Any = None, copy: bool = False) -> jax.Array:
    """Return the JAX array with the values of a torch tensor.

    Shares memory where the tensor is contiguous, aligned, on the CPU and of the right dtype;
    else copies. Gradients do not cross: a tensor that requires grad is detached.

    Parameters
    ----------
    t : Tensor
        Dense; any dtype that JAX has.
    dtype : dtype, optional
        Convert to this dtype (in torch, before the hand-over). The way to hand a float64 tensor
        to a JAX without x64.
    copy : bool
        Never share memory: needed if ``t`` will be written to.

    Returns
    -------
    jax.Array, of the same shape and of exactly the requested dtype

    Raises
    ------
    TypeError
        If ``t`` is not a dense tensor, or its dtype does not exist in JAX as configured (float64,
        complex128 and int64 with jax_enable_x64 off).
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"from_torch: t must be a torch tensor; got {type(t).__name__}.")
    if t.layout != torch.strided:
        raise TypeError(
            f"from_torch: t must be dense; got layout {t.layout}. For a sparse matrix use "
            "funclsq.jax.Sparse.from_torch."
        )
    t = t.detach()
    if dtype is not None:
        if np.dtype(dtype) not in _TO_TORCH:
            raise TypeError(f"from_torch: torch has no dtype for {np.dtype(dtype)}.")
        t = t.to(_TO_TORCH[np.dtype(dtype)])
    if t.dtype not in _TO_JAX:
        raise TypeError(f"from_torch: JAX has no dtype for {t.dtype}.")
    target = np.dtype(_TO_JAX[t.dtype])
    require_representable(target, "from_torch: the tensor")
    if not (t.is_contiguous() and t.device.type in ("cpu", "cuda")):
        t = t.cpu() if t.device.type not in ("cpu", "cuda") else t
        t = t.contiguous()
    elif copy or (t.device.type == "cpu" and t.data_ptr() % 64):
        t = t.clone()
    t = t.resolve_conj().resolve_neg()
    if t.numel() == 0:
        return jnp.zeros(tuple(t.shape), target)
    if t.dtype == torch.bool:  # DLPack booleans are bytes on some versions
        return jnp.asarray(t.cpu().numpy(), copy=True)
    return jnp.from_dlpack(t)


def to_torch(a: Any, *, dtype: torch.dtype | None = None, copy: bool = False) -> Tensor:
    """Return the torch tensor with the values of a JAX array.

    Shares memory where it can (do not write to the result then: JAX takes its arrays to be
    constant); waits for the array to be computed. Gradients do not cross.

    Parameters
    ----------
    a : jax.Array
        Concrete: a tracer has no values.
    dtype : torch.dtype, optional
        Convert to this dtype.
    copy : bool
        Never share memory: needed if the result will be written to.

    Returns
    -------
    Tensor, of the same shape and, unless ``dtype`` is given, of exactly the same dtype

    Raises
    ------
    TypeError
        If ``a`` is a tracer, no array, or of a dtype that torch lacks.
    """
    if isinstance(a, jax.core.Tracer):
        raise TypeError(
            "to_torch: inside jit, grad or vmap an array has no values. Convert outside, or use "
            "funclsq.jax functions, which run torch inside JAX programs."
        )
    if not isinstance(a, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"to_torch: a must be a JAX array; got {type(a).__name__}.")
    if np.dtype(a.dtype) not in _TO_TORCH:
        raise TypeError(f"to_torch: torch has no dtype for {a.dtype}.")
    target = _TO_TORCH[np.dtype(a.dtype)]
    if isinstance(a, jax.Array) and a.size and a.dtype != jnp.bool_ and len(a.devices()) == 1:
        t = torch.from_dlpack(a)
    elif a.dtype == jnp.bfloat16:
        t = torch.from_numpy(np.array(a).view(np.int16)).view(torch.bfloat16)
    else:
        t = torch.from_numpy(np.array(a))
    assert t.dtype == target, (t.dtype, target)
    if dtype is not None and dtype != t.dtype:
        return t.to(dtype)
    return t.clone() if copy else t
