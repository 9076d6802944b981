"""What a single operand must be: a dense tensor of a known dtype, on one device, with sane entries.

Every check raises at the call, with the name of the function called, what was expected, what was
given and what to do.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.beneath import beneath, tracing
from funclsq.torch_sparse import is_sparse

__all__ = [
    "dense_tensor",
    "from_array",
    "real_dtype",
    "require_finite",
    "require_inexact",
    "require_not_negative",
    "require_real_like",
    "require_same",
]


def from_array(a: np.ndarray) -> Tensor:
    """Return a tensor of a NumPy array: the same memory, or a copy of what is not to be written."""
    return torch.from_numpy(a if a.flags.writeable else a.copy())


def dense_tensor(t: Any, what: str, name: str) -> Tensor:
    """Return a torch tensor of NumPy or torch data; refuse anything else, and sparse layouts."""
    if isinstance(t, np.ndarray):
        t = from_array(t)
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{name}: {what} must be a torch tensor; got {type(t).__name__}. For JAX arrays use "
            "funclsq.jax."
        )
    if is_sparse(t):
        raise TypeError(f"{name}: {what} must be dense; got layout {t.layout}. Call .to_dense().")
    return t


def require_same(a: Tensor, b: Tensor, what: str, other: str, name: str) -> None:
    """Require one dtype and one device."""
    if a.dtype != b.dtype:
        raise TypeError(
            f"{name}: {what} and {other} must have one dtype; got {a.dtype} and {b.dtype}. "
            f"Convert one with .to({b.dtype})."
        )
    _require_device(a, b, what, other, name)


def _require_device(a: Tensor, b: Tensor, what: str, other: str, name: str) -> None:
    if a.device != b.device:
        raise ValueError(
            f"{name}: {what} and {other} must be on one device; got {a.device} and {b.device}. "
            f"Move one with .to({str(b.device)!r})."
        )


def require_inexact(t: Any, what: str, name: str) -> None:
    """Require a floating point or complex dtype that the solvers know."""
    if not (t.dtype.is_floating_point or t.dtype.is_complex):
        raise TypeError(
            f"{name}: {what} must be floating point or complex; got {t.dtype}. Convert it with "
            f"{what}.to(torch.float64)."
        )
    if t.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{name}: {what} must be float32, float64, complex64 or complex128; got {t.dtype}. "
            f"Convert it with {what}.float()."
        )


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the real part; ``dtype.to_real()``, which torch.compile cannot trace."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)


def require_real_like(t: Tensor, b: Tensor, what: str, name: str) -> None:
    """Require the real dtype and the device of b."""
    real = real_dtype(b.dtype)
    if t.dtype != real:
        raise TypeError(
            f"{name}: {what} must have dtype {real} beside b of {b.dtype}; got {t.dtype}. Convert "
            f"it with .to({real})."
        )
    _require_device(t, b, what, "b", name)


def require_finite(t: Tensor, what: str, name: str) -> None:
    """Look at the data under every transform; tracing cannot be looked through."""
    if not tracing() and not bool(torch.isfinite(beneath(t.detach())).all()):
        raise ValueError(f"{name}: {what} must be finite; got NaN or Inf entries. Repair {what}.")


def require_not_negative(t: Tensor, what: str, name: str) -> None:
    """Look at the data under every transform; tracing cannot be looked through."""
    if tracing():
        return
    t = beneath(t.detach())
    if bool((t < 0).any()):
        raise ValueError(
            f"{name}: {what} must not be negative; got a smallest entry of {float(t.min()):.3g}. "
            f"Pass {what} >= 0."
        )
