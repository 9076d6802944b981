"""Krylov runs with their answer verified: true residuals, corrections, an honest status.

The estimates in a Krylov loop are recursive and can lie. So each run is followed by the true
residuals r = c - A x and s = g + A^H r, and where s is not at the level that rounding explains, by
another run for the correction. A correction that does not lower s is undone.

What rounding explains: an x that solves the problem for a matrix A + E, ||E|| = eps ||A||, has
||s|| of about eps ||A|| (||r|| + ||A|| ||x||).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._extended_cg import ExtendedCg
from funclsq.methods._golub_kahan import Inverse
from funclsq.methods._iterate import Report, Run, Targets, iterate
from funclsq.methods._scalars import one_column, scalars_for
from funclsq.passes import flat
from funclsq.range import safe_norm
from funclsq.solution import Status

__all__ = ["Answer", "Settings", "first_run", "norms", "solve_verified"]

_PASSES = 4  # runs at most: the first and three corrections
_REDUCTION = 1e-6  # of the residual by each run with a preconditioner, which makes runs short
_TIGHTER = 32.0  # times, the tolerance of each further run with a preconditioner
_LOOSER = 16.0  # times the tolerance, for a run whose x grew into a null space
_SLACK = 4.0  # times what rounding explains that a true residual may be
_AT_EPS = 1e3  # a tolerance below this many eps is called the rounding level
_CONVERGED = np.array([Status(code).converged for code in Status])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Tolerances of a solve, with the defaults filled in.

    Parameters
    ----------
    atol, btol, conlim : float
        See :class:`Targets`.
    maxiter : int
        Steps in all runs together.
    eps : float
        Unit roundoff of the dtype.
    definite : bool
        Whether A is known to have no null space.
    report : callable or None
        Called with a dict of the state at every check; True ends the run.
    inverse : callable or None
        Applies a preconditioner N^-1. Its rounding is that of cond(N), so that the solution is
        reached by short runs for corrections rather than by one to the end.
    """

    atol: float
    btol: float
    conlim: float
    maxiter: int
    eps: float
    definite: bool
    report: Callable[[dict[str, Any]], bool] | None = None
    inverse: Inverse | None = None


@dataclasses.dataclass
class Answer:
    """x (..., n, k), r = c - A x (..., m, k), and per column the status, count and estimates."""

    x: Tensor
    r: Tensor
    status: np.ndarray
    iterations: np.ndarray
    anorm: np.ndarray
    acond: np.ndarray


def norms(v: Tensor) -> np.ndarray:
    """||v|| of each column, on the host in double precision."""
    return safe_norm(v).to(torch.float64).cpu().numpy()


def solve_verified(
    method: Callable[..., Any],
    op: Any,
    c: Tensor,
    g: Tensor | None,
    settings: Settings,
) -> Answer:
    """Solve A^H A x = A^H c + g to the tolerance, or say that it was not reached.

    Parameters
    ----------
    method : callable
        State of the method: Lsmr, Lsqr, ExtendedCg; the last where there is a g.
    op : operator
        A, of shape (m, n), scaled so that its norm and those of c and g are moderate.
    c : Tensor, shape (..., m, k)
        Right-hand side in the range; zero if only g is meant.
    g : Tensor, shape (..., n, k), or None
        Right-hand side in the domain.
    settings : Settings
        Tolerances.

    Returns
    -------
    Answer
        The solution with its residual and status.
    """
    targets = _targets(settings, c, g)
    # CG with a preconditioner blows the rounding of A^H r up where r stays large. Its corrections
    # are sought from s itself: then r belongs to the correction, and is small.
    from_s = g is not None or (settings.inverse is not None and method is ExtendedCg)
    run = iterate(
        method, op, c, targets, settings.maxiter, _reporter(settings, 0), **_extra(settings, g)
    )
    answer, s = _answer(op, c, g, run)
    pending = _judge(answer, norms(s), targets, settings)
    asked = dataclasses.replace(settings, atol=_LOOSER * settings.atol)
    for correction in range(1, _PASSES):
        used = int(answer.iterations.max(initial=0))
        if not pending.any() or used >= settings.maxiter:
            break
        # A column whose x grew into the null space starts again, with a looser tolerance.
        grown = pending & _grown(answer, targets) & targets.bounded
        if grown.any():
            settings = dataclasses.replace(settings, atol=_LOOSER * settings.atol)
        targets = dataclasses.replace(
            targets,
            atol=settings.atol,
            xnorm=np.where(grown, 0.0, norms(answer.x)),
            rnorm=np.where(grown, 0.0, norms(answer.r)),
        )
        # With one, the run ends by another norm than s is judged by: ask more of the next run.
        tighter = 1.0 if settings.inverse is None else _TIGHTER**-correction
        goals = dataclasses.replace(
            targets, consistent=not from_s, atol=max(settings.eps, settings.atol * tighter)
        )
        redo, on = _mask(grown, c), _mask(pending, c)
        if not from_s:
            rhs, extra = torch.where(on, torch.where(redo, c, answer.r), 0), _extra(settings, None)
        else:
            rhs, extra = torch.zeros_like(c), _extra(settings, torch.where(on, s, 0))
        report = _reporter(settings, used)
        run = iterate(method, op, rhs, goals, settings.maxiter - used, report, **extra)
        run.x = torch.where(on, run.x, 0).add_(torch.where(redo, 0, answer.x))
        trial, s_trial = _answer(op, c, g, run)
        before, after = norms(s), norms(s_trial)
        better = pending & ((after < before) | grown)
        answer = _merge(answer, trial, better, pending)
        s = torch.where(_mask(better, c), s_trial, s)
        pending &= _judge(answer, norms(s), targets, settings)
        stalled = pending & ~(after <= 0.5 * before) & ~grown
        answer.status[stalled] = int(Status.STAGNATED)
        pending &= ~stalled
    if settings.atol > asked.atol:
        # Loosened more than once, the tolerance may have been met by leaving out directions in
        # which A is small, but not null: one time is rounding's due, beyond it s itself must say.
        pending |= _judge(answer, norms(s), targets, asked, 1.0)
    if pending.any():
        pending &= ~_consistent(answer, targets, settings.eps)
        answer.status[pending] = int(Status.STAGNATED)
    return answer


def first_run(method: Callable[..., Any], op: Any, c: Tensor, settings: Settings) -> Run:
    """One run for A^H A x = A^H c, its answer believed; arguments as of :func:`solve_verified`."""
    targets, report = _targets(settings, c, None), _reporter(settings, 0)
    return iterate(method, op, c, targets, settings.maxiter, report, **_extra(settings, None))


def _targets(settings: Settings, c: Tensor, g: Tensor | None) -> Targets:
    bnorm = norms(c)
    zero = np.zeros_like(bnorm)
    return Targets(
        atol=settings.atol,
        btol=settings.btol,
        conlim=settings.conlim,
        at_eps=settings.atol <= _AT_EPS * settings.eps,
        bnorm=bnorm,
        xnorm=zero,
        rnorm=zero,
        xlimit=settings.eps**-0.5 if settings.inverse is None else 0.0,
        reduction=0.0 if settings.inverse is None else _REDUCTION,
        consistent=g is None,
        # With a preconditioner ||A|| is that of another norm, and so no measure of ||A|| ||x||.
        bounded=g is None and not settings.definite and settings.inverse is None,
    )


def _mask(columns: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(columns).to(like.device).unsqueeze(-2)


def _grown(answer: Answer, targets: Targets) -> np.ndarray:
    """Whether ||A|| ||x|| is so large that the rounding of A x hides the residual."""
    with np.errstate(invalid="ignore", over="ignore"):  # zero times what overflowed has grown too
        return ~(answer.anorm * norms(answer.x) <= targets.xlimit * targets.bnorm)


def _extra(settings: Settings, g: Tensor | None) -> dict[str, Any]:
    extra = {"inverse": settings.inverse, "g": g}
    return {name: value for name, value in extra.items() if value is not None}


def _answer(op: Any, c: Tensor, g: Tensor | None, run: Run) -> tuple[Answer, Tensor]:
    passes = one_column(op, scalars_for(c))
    if passes is None:
        r = c - op.mv(run.x)
        s = op.rmv(r)
    else:
        r, s = c.clone(memory_format=torch.contiguous_format), torch.zeros_like(run.x)
        passes.through(flat(run.x), 1.0, flat(r), flat(s))  # A x - c,  A^H (A x - c)
        r, s = r.neg_(), s.neg_()
    if g is not None:
        s = s + g
    return Answer(run.x, r, run.status, run.iterations, run.anorm, run.acond), s


def _judge(
    answer: Answer,
    snorm: np.ndarray,
    targets: Targets,
    settings: Settings,
    slack: float = _SLACK,
) -> np.ndarray:
    """Say which columns have ended, by their own estimates, and are not there by true residuals."""
    rnorm, xnorm = norms(answer.r), norms(answer.x)
    eps = settings.eps
    # With a preconditioner the estimate is of another norm; here columns are scaled to 1.
    anorm = answer.anorm if settings.inverse is None else np.ones_like(answer.anorm)
    with np.errstate(all="ignore"):
        image = anorm * xnorm
    if targets.consistent and settings.inverse is None:  # an x beyond the limit explains nothing
        image = np.where(_grown(answer, targets), 0.0, image)
    scale = settings.atol * rnorm + eps * (rnorm + targets.bnorm + image)
    met = snorm <= slack * anorm * scale
    if targets.consistent:
        met |= rnorm <= slack * (settings.btol * targets.bnorm + settings.atol * image)
    stalled = answer.status == int(Status.STAGNATED)
    answer.status[stalled & met] = int(Status.NORMAL_RESIDUAL_AT_EPS)
    answer.status[~(np.isfinite(snorm) & np.isfinite(xnorm))] = int(Status.NONFINITE)
    return (_CONVERGED[answer.status] | stalled) & ~met


def _consistent(answer: Answer, targets: Targets, eps: float) -> np.ndarray:
    """Whether r is the rounding of A x, and x large but not beyond belief."""
    with np.errstate(all="ignore"):
        image = answer.anorm * norms(answer.x)
        small = norms(answer.r) <= _SLACK * eps * image
        return targets.consistent & small & (image <= eps**-0.75 * targets.bnorm)


def _merge(old: Answer, new: Answer, better: np.ndarray, pending: np.ndarray) -> Answer:
    take = _mask(better, old.x)
    return Answer(
        torch.where(take, new.x, old.x),
        torch.where(take, new.r, old.r),
        np.where(better, new.status, old.status),
        old.iterations + np.where(pending, new.iterations, 0),
        np.where(pending, np.fmax(old.anorm, new.anorm), old.anorm),
        np.where(pending, np.fmax(old.acond, new.acond), old.acond),
    )


def _reporter(settings: Settings, base: int) -> Report | None:
    call = settings.report
    if call is None:
        return None

    def report(count: int, active: np.ndarray, rnorm: np.ndarray, arnorm: np.ndarray) -> bool:
        return call(
            {
                "iteration": base + count,
                "active": active,
                "residual_norm": rnorm,
                "normal_residual_norm": arnorm,
            }
        )

    return report
