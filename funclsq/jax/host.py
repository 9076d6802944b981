"""The host side of a solve: from torch views of JAX's buffers to results in JAX's buffers."""

from __future__ import annotations

import itertools
import operator
import warnings
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import ConvergenceWarning
from funclsq.plan import Plan
from funclsq.precision import WIDE
from funclsq.raw import NotFiniteError, raw_solve
from funclsq.solution import Status

__all__ = ["HostNull", "HostSolve"]


class HostSolve:
    """A solve as a host function.

    It writes the results that the problem names; NaN and a status for members and columns whose
    input is not finite.

    Parameters
    ----------
    problem : Problem
        What is static.
    has : tuple of bool
        Which of (w, d2, c, g, gate) are among the inputs, after the parameters and indices of A.
    """

    def __init__(self, problem: Any, has: tuple[bool, ...]) -> None:
        self._problem = problem
        self._params = len(problem.structure.param_ndims)
        self._aux = self._params + len(problem.structure.aux_ndims)
        rank = itertools.count(self._aux)
        # (w, d2, c, g, gate) of the inputs followed by None
        self._optional = operator.itemgetter(*(next(rank) if present else -1 for present in has))
        self._fixed = None if self._aux > self._params else problem.structure.host((), ())[0]
        self._needs = ("x" in problem.results, "s" in problem.results)
        self._plan: Plan | None = None
        self._wide = problem.compute_dtype == "float64"
        self._plain = problem.results == ("x",) and not has[-1]  # x alone, and no gate

    def _plan_for(self, structure: Any) -> Plan:
        plan = self._plan  # read once: other threads may be solving with other indices
        if plan is None or plan.structure is not structure:
            p = self._problem
            fixed = (p.options, p.full_rank, p.damped, _on_failure(p), p.check_finite)
            self._plan = plan = Plan.of(structure, *fixed, p.residuals, "s" in p.results)
        return plan

    def __call__(self, outputs: Any, inputs: Any) -> None:
        """Solve, from views of JAX's arrays to views of JAX's results."""
        problem = self._problem
        w, d2, c, g, gate = self._optional([*inputs, None])
        if gate is not None and not bool(gate.any()):
            self._skip(outputs)
            return
        structure, params, w, d2, c, g = self._operands(inputs, w, d2, c, g)
        plan, (need_x, need_s), bad = self._plan_for(structure), self._needs, None
        primary, check = problem.primary, problem.check_finite
        try:
            found = raw_solve(plan, params, w, d2, c, g, gate, primary, need_x, check, need_s)
        except NotFiniteError:
            params, w, d2, c, g, bad = _repair(structure, params, w, d2, c, g)
            found = raw_solve(plan, params, w, d2, c, g, gate, primary, need_x, False, need_s)
        if bad is None and self._plain:
            outputs[0].copy_(found[0])
            return
        out = dict(zip(problem.results, outputs))
        for name, value in zip(("x", "s"), found):
            if name in out:
                out[name].copy_(value)
        info = found[2]
        if "deficient" in out:
            out["deficient"].copy_(info[..., 0, 6] if info.shape[-2] else torch.zeros(()))
        if "info" in out:
            out["info"].copy_(info.nan_to_num_(nan=-1.0))
        if gate is not None and gate.ndim:
            off = gate == 0
            for name, t in out.items():
                if name != "info":
                    t.masked_fill_(off if name == "deficient" else off[:, None, None], 0.0)
        if bad is not None:
            _spoil(problem, bad.expand(info.shape[:-1]), out)

    def _operands(self, inputs, *optional):
        """Torch structure, its parameters, and (w, d2, c, g), in the dtype of the computation."""
        structure, params = self._fixed, tuple(inputs[: self._params])
        if structure is None:
            aux = inputs[self._params : self._aux]
            structure, params = self._problem.structure.host(params, aux)
        if self._wide:
            params, optional = tuple(map(_widen, params)), tuple(map(_widen, optional))
        return structure, params, *optional

    def _skip(self, outputs: Any) -> None:
        for name, t in zip(self._problem.results, outputs):
            t.zero_()
            if name == "info":
                t[..., 0] = int(Status.SKIPPED)


class HostNull(HostSolve):
    """N v of ``nullspace`` as a host function; v stands where the g of a solve would."""

    def __call__(self, outputs: Any, inputs: Any) -> None:
        """Project twice, unless the gate says that nothing would be left."""
        (out,) = outputs
        w, d2, _, v, gate = self._optional([*inputs, None])
        if not bool(gate.any()):
            out.zero_()
            return
        structure, params, w, d2, _, v = self._operands(inputs, w, d2, None, v)
        bad = None
        try:
            found = self._project(structure, params, w, d2, v, gate, self._problem.check_finite)
        except NotFiniteError:
            params, w, d2, _, v, bad = _repair(structure, params, w, d2, None, v)
            found = self._project(structure, params, w, d2, v, gate, False)
        out.copy_(found)
        if bad is not None:
            out.masked_fill_(bad.unsqueeze(-2), torch.nan)
        if gate.ndim:
            out.masked_fill_((gate == 0)[:, None, None], 0.0)

    def _project(self, structure, params, w, d2, v, gate, check):
        plan, op = self._plan_for(structure), structure.bind(params)
        for _ in range(2):
            g = None if d2 is None else d2.unsqueeze(-1) * v
            away = raw_solve(plan, params, w, d2, op.mv(v), g, gate, False, True, check, False)[0]
            v = v - away
        return v


def _on_failure(problem: Any) -> str:
    """A primary solve that must raise reports by its status (an error inside JAX, later)."""
    if problem.on_failure == "raise":
        return "ignore" if problem.primary else "raise"
    return problem.on_failure


def _widen(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.to(WIDE.get(t.dtype, t.dtype))


def _repair(structure, params, w, d2, c, g):
    """Replace members and columns that are not finite by zeros, and say which they were."""
    matrix = torch.as_tensor(False)
    for t, core in (*zip(params, structure.param_ndims), (w, 1), (d2, 1)):
        if t is not None:
            wrong = ~torch.isfinite(t)
            matrix = matrix | wrong.flatten(t.ndim - core).any(-1)
    column = torch.as_tensor(False)
    for t in (c, g):
        if t is not None:
            column = column | (~torch.isfinite(t)).any(-2)
    if w is not None:
        matrix = matrix | (w < 0).any(-1)
        w = w.clamp(min=0.0)
    params = tuple(map(_clean, params))
    clean = (_clean(t) for t in (w, d2, c, g))
    return params, *clean, matrix.unsqueeze(-1) | column


def _clean(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.nan_to_num(t, 0.0, 0.0, 0.0)


def _spoil(problem, bad, out):
    for name in ("x", "s"):
        if name in out:
            out[name].masked_fill_(bad.unsqueeze(-2), torch.nan)
    if not bool(bad.any()):
        return
    if "info" in out:
        out["info"][..., 0].masked_fill_(bad, float(Status.NONFINITE))
        out["info"][..., 2:4].masked_fill_(bad.unsqueeze(-1), -1.0)
    if problem.primary and problem.on_failure == "warn":
        warnings.warn(
            f"NONFINITE: {int(bad.sum())} of {bad.numel()} solves had NaN or Inf in A, b, damp or "
            "weights, or a negative weight; their x is NaN. Repair the input, or give a row "
            "weight 0 and a finite value.",
            ConvergenceWarning,
            stacklevel=2,
        )
