"""Working in double precision inside, on single-precision data, and the way back.

Operands are cast up before the primitive and x is cast down after it, both by differentiable
casts: the rules of all derivatives then run in double precision too, and only what comes out is
rounded to the precision of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.beneath import beneath, tracing
from funclsq.info import report
from funclsq.solution import Status

__all__ = ["WIDE", "narrowed", "widening"]

WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_NONFINITE = float(Status.NONFINITE)
_DOUBLE = (torch.float64, "float64")
_DOUBLE_COMPLEX = (*_DOUBLE, torch.complex128, "complex128")


def widening(
    compute_dtype: Any, dtype: torch.dtype, name: str
) -> Callable[[torch.dtype], torch.dtype]:
    """Return the map from a dtype of the data to the one that is computed in.

    Parameters
    ----------
    compute_dtype : {None, torch.float64}
        None computes in the dtype of the data. ``torch.complex128`` means the same as
        ``torch.float64`` where the data are complex.
    dtype : torch.dtype
        Of the data.
    name : str
        Of the function called.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if compute_dtype is None:
        return lambda d: d
    if compute_dtype not in (_DOUBLE_COMPLEX if dtype.is_complex else _DOUBLE):
        raise ValueError(
            f"{name}: compute_dtype must be None (as the data) or torch.float64; got "
            f"{compute_dtype!r} for data of {dtype}."
        )
    return lambda d: WIDE.get(d, d)


def narrowed(x: Tensor, info: Tensor, dtype: torch.dtype, plan: Any) -> tuple[Tensor, Tensor]:
    """Round x, (..., n, k), to the dtype of the data; a column that overflows is NONFINITE."""
    if x.dtype == dtype:
        return x, info
    x = x.to(dtype)
    fits = torch.isfinite(x.detach()).all(-2)
    status = torch.where(fits, info[..., 0], _NONFINITE)
    info = torch.cat((status.unsqueeze(-1), info[..., 1:]), -1)
    if not tracing() and not bool(beneath(fits).all()):
        report(plan.on_failure, beneath(info.detach()), lambda: None)
    return x, info
