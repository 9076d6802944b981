"""The info table of a solve, one row per column: what happened, as plain numbers.

    status, iterations, ||W^(1/2) r||, ||A^H W r + g - D2 x||, rank, cond, deficient, method

On the CPU it is written by NumPy: a dozen operations on arrays of one element cost more in torch
than a small solve does.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.errors import ConvergenceError, ConvergenceWarning
from funclsq.extent import finite
from funclsq.range import safe_norm
from funclsq.solution import Status, describe

__all__ = ["INFO", "assumed_deficient", "report", "residual_norms", "table"]

INFO = 8
_ABSENT = (-1.0, math.nan, 1.0, 0.0)  # stands for facts that a method does not know
_GOOD = np.zeros(max(Status) + 1, dtype=bool)
_GOOD[[int(status) for status in Status if status.converged]] = True


def table(
    x: Tensor, status: Tensor, iterations: Tensor, norms: Any, prepared: Any, checked: bool
) -> Tensor:
    """Fill the table.

    Parameters
    ----------
    x : Tensor, shape (..., n, k)
        The solution; with ``checked`` a column that is not finite is NONFINITE.
    status, iterations : Tensor, shape (..., k)
        What the method says.
    norms : pair of Tensor, shape (..., k), or None
        Residual norms; None if nobody reads them, and of the condition number only derivatives
        that have a null space to clear of what is not in it.
    prepared : Prepared
        The method, which may know rank and condition.
    checked : bool
        Whether x is looked at.
    """
    shape = (*x.shape[:-2], x.shape[-1], INFO)
    real = x.real.dtype if x.is_complex() else x.dtype
    deficient = assumed_deficient(prepared)
    cond = None if norms is None and not _any(deficient) else prepared.cond  # which may be work
    facts = (prepared.rank, cond, deficient, prepared.method)
    values = [status, iterations, *((math.nan, math.nan) if norms is None else norms)]
    values += [absent if fact is None else fact for fact, absent in zip(facts, _ABSENT)]
    if math.prod(shape) == INFO and x.device.type == "cpu":
        return _one_row(x, values, shape, norms is not None, checked)
    info: Any = torch.empty(shape, dtype=real, device=x.device)
    out, as_is = (info.numpy(), _array) if x.device.type == "cpu" else (info, _column)
    for slot, value in enumerate(values):
        if isinstance(value, Tensor):
            one_per_matrix = slot >= 4 and value.ndim > 0
            value = as_is(value.unsqueeze(-1) if one_per_matrix else value, info)
        out[..., slot] = value
    if checked:
        _mark_nonfinite(x, info, norms is not None)
    return info


def _one_row(x: Tensor, values: list[Any], shape: Any, norms: bool, checked: bool) -> Tensor:
    row = [value.item() if isinstance(value, Tensor) else value for value in values]
    real = np.float32 if x.dtype in (torch.float32, torch.complex64) else np.float64
    info = torch.from_numpy(np.array(row, real).reshape(shape))
    if checked and not (finite(x) and (math.isfinite(row[2]) or not norms)):
        _mark_nonfinite(x, info, norms)
    return info


def _array(t: Tensor, _: Tensor) -> np.ndarray:
    return t.detach().numpy()


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.device, like.dtype)


def _mark_nonfinite(x: Tensor, info: Tensor, norms: bool) -> None:
    if x.device.type == "cpu" and finite(x) and (not norms or finite(info[..., 2])):
        return
    bad = ~torch.isfinite(x).all(-2)
    if norms:
        bad |= ~torch.isfinite(info[..., 2])
    info[..., 0] = torch.where(bad, float(Status.NONFINITE), info[..., 0])


def residual_norms(op: Any, w: Any, d2: Any, c: Any, g: Any, x: Any, s: Any) -> Any:
    """||W^(1/2) r|| and ||A^H W r + g - D2 x|| for r = c - A x = -s, per column."""
    if s is None:
        s = op.mv(x) if c is None else op.mv(x) - c
    r = -s
    normal = op.rmv(r if w is None else r * w.unsqueeze(-1))
    if g is not None:
        normal = normal + g
    if d2 is not None:
        normal = normal - d2.unsqueeze(-1) * x
    return safe_norm(r if w is None else r * w.sqrt().unsqueeze(-1)), safe_norm(normal)


def assumed_deficient(prepared: Any) -> Any:
    """What to say of the rank without working for it: a Krylov method may not know yet."""
    assumed = getattr(prepared, "assumed_deficient", None)
    return prepared.deficient if assumed is None else assumed


def _any(flag: Any) -> bool:
    """Whether a flag is set; True for one that lies on a device, which is not asked."""
    if isinstance(flag, Tensor):
        return flag.device.type != "cpu" or bool(flag.any())
    return bool(flag)


def report(on_failure: str, info: Tensor, norms: Any) -> None:
    """Warn or raise if a solve did not converge; ``norms()`` gives norms that are still missing."""
    if on_failure == "ignore":
        return
    rows = info.cpu().numpy()
    if _GOOD[int(rows.item(0))] if rows.size == INFO else _GOOD[rows[..., 0].astype(int)].all():
        return
    if bool(info[..., 2].isnan().any()):
        found = norms()
        if found is not None:
            info[..., 2], info[..., 3] = found
    text = describe(info[..., 0], info[..., 1], info[..., 2], info[..., 3])
    if on_failure == "raise":
        raise ConvergenceError(text)
    warnings.warn(text, ConvergenceWarning, stacklevel=2)
