"""The host side of a solve: from torch views of JAX's buffers to results in JAX's buffers."""

from __future__ import annotations

import cmath
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import ConvergenceWarning
from funclsq.raw import Plan, raw_solve
from funclsq.solution import Status

__all__ = ["HostSolve"]

_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


class HostSolve:
    """A solve as a host function.

    It writes (x, A x, info, deficient); NaN and a status for members and columns whose input is
    not finite.

    Parameters
    ----------
    problem : Problem
        What is static.
    operands : callable
        From the list of inputs to the operands of the primitive.
    """

    def __init__(self, problem: Any, operands: Callable[[Any], Any]) -> None:
        self._problem, self._operands = problem, operands
        self._plan: Plan | None = None

    def _plan_for(self, structure: Any) -> Plan:
        if self._plan is None or self._plan.structure is not structure:
            p = self._problem
            fixed = (p.options, p.full_rank, p.damped, _on_failure(p), False)
            self._plan = Plan.of(structure, *fixed)
        return self._plan

    def __call__(self, outputs: Any, inputs: Any) -> None:
        """Solve, from views of JAX's arrays to views of JAX's results."""
        problem, ops = self._problem, self._operands(inputs)
        x, ax, info, deficient = outputs
        gate = ops.gate
        if gate is not None and not bool(gate.any()):
            for t in outputs:
                t.zero_()
            info[..., 0] = int(Status.SKIPPED)
            return
        structure, params = problem.structure.host(ops.params, ops.aux)
        w, d2, c, g = ops.w, ops.d2, ops.c, ops.g
        bad = None
        if problem.check_finite:
            params, w, d2, c, g, bad = _repair(structure, params, w, d2, c, g)
        if problem.compute_dtype == "float64":
            params = tuple(map(_widen, params))
            w, d2, c, g = map(_widen, (w, d2, c, g))
        plan = self._plan_for(structure)
        found = raw_solve(plan, params, w, d2, c, g, gate, problem.primary)
        x.copy_(found[0])
        ax.copy_(found[1])
        info.copy_(found[2].nan_to_num_(nan=-1.0))
        if info.shape[-2]:
            deficient.copy_(info.select(-1, 6).select(-1, 0))
        else:
            deficient.zero_()
        if gate is not None and gate.ndim:
            off = gate == 0
            for t in (x, ax):
                t.masked_fill_(off[:, None, None], 0.0)
            deficient.masked_fill_(off, 0.0)
        if bad is not None:
            _spoil(problem, bad, x, ax, info)


def _on_failure(problem: Any) -> str:
    """A primary solve that must raise reports by its status (an error inside JAX, later)."""
    if problem.on_failure == "raise":
        return "ignore" if problem.primary else "raise"
    return problem.on_failure


def _widen(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(_WIDE.get(t.dtype, t.dtype))


def _finite(t: Tensor | None) -> bool:
    """Whether all entries are finite: one pass, no temporary (a sum that overflows says no)."""
    return t is None or cmath.isfinite(t.sum().item())


def _repair(structure, params, w, d2, c, g):
    """Replace members and columns that are not finite by zeros, and say which they were."""
    negative = w is not None and bool((w < 0).any())
    if not negative and all(map(_finite, (*params, w, d2, c, g))):
        return params, w, d2, c, g, None
    matrix = torch.as_tensor(False)
    for t, core in (*zip(params, structure.param_ndims), (w, 1), (d2, 1)):
        if t is not None:
            wrong = ~torch.isfinite(t)
            matrix = matrix | wrong.flatten(t.ndim - core).any(-1)
    column = torch.as_tensor(False)
    for t in (c, g):
        if t is not None:
            column = column | (~torch.isfinite(t)).any(-2)
    if negative:
        matrix = matrix | (w < 0).any(-1)
        w = w.clamp(min=0.0)
    params = tuple(map(_clean, params))
    clean = (_clean(t) for t in (w, d2, c, g))
    return params, *clean, matrix.unsqueeze(-1) | column


def _clean(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.nan_to_num(t, 0.0, 0.0, 0.0)


def _spoil(problem, bad, x, ax, info):
    bad = bad.expand(info.shape[:-1])
    for t in (x, ax):
        t.masked_fill_(bad.unsqueeze(-2), torch.nan)
    if not bool(bad.any()):
        return
    info[..., 0].masked_fill_(bad, float(Status.NONFINITE))
    info[..., 2:4].masked_fill_(bad.unsqueeze(-1), -1.0)
    if problem.primary and problem.on_failure == "warn":
        warnings.warn(
            f"NONFINITE: {int(bad.sum())} of {bad.numel()} solves had NaN or Inf in A, b, damp or "
            "weights, or a negative weight; their x is NaN. Repair the input, or give a row "
            "weight 0 and a finite value.",
            ConvergenceWarning,
            stacklevel=2,
        )
