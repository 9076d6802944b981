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

from funclsq.solution import Status
from funclsq.solvers._iterate import Report, Run, Targets, iterate

__all__ = ["Answer", "Settings", "solve_verified"]

_PASSES = 4  # runs at most: the first and three corrections
_SLACK = 4.0  # times what rounding explains that a true residual may be
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
    report : callable or None
        Called with a dict of the state at every check.
    """

    atol: float
    btol: float
    conlim: float
    maxiter: int
    eps: float
    report: Callable[[dict[str, Any]], None] | None = None


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
    return torch.linalg.vector_norm(v, dim=-2).to(torch.float64).cpu().numpy()


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
    bnorm = norms(c)
    zero = np.zeros_like(bnorm)
    targets = Targets(settings.atol, settings.btol, settings.conlim,
        settings.atol <= _at_eps(settings.eps), bnorm, zero, zero, g is None)  # fmt: skip
    total = zero.astype(np.int64)
    report = _reporter(settings, total)
    run = iterate(method, op, c, targets, settings.maxiter, report, **_extra(g))
    answer, s = _answer(op, c, g, run)
    snorm = norms(s)
    pending = _judge(answer, snorm, targets, settings)
    for _ in range(_PASSES - 1):
        budget = settings.maxiter - int(answer.iterations.max(initial=0))
        if not pending.any() or budget <= 0:
            break
        mask = torch.from_numpy(pending).to(device=c.device).unsqueeze(-2)
        targets = dataclasses.replace(
            targets, xnorm=norms(answer.x), rnorm=norms(answer.r), consistent=g is None
        )
        rhs = torch.where(mask, answer.r, 0) if g is None else torch.zeros_like(c)
        more = iterate(
            method, op, rhs, targets, budget, _reporter(settings, answer.iterations),
            **_extra(None if g is None else torch.where(mask, s, 0)),
        )  # fmt: skip
        more.x = torch.where(mask, more.x, 0).add_(answer.x)
        trial, s_trial = _answer(op, c, g, more)
        trial_norm = norms(s_trial)
        better = pending & (trial_norm < snorm)
        take = torch.from_numpy(better).to(c.device).unsqueeze(-2)
        ratio = np.divide(trial_norm, snorm, out=np.ones_like(snorm), where=snorm > 0)
        answer = _merge(answer, trial, take, better, pending)
        s = torch.where(take, s_trial, s)
        snorm = np.where(better, trial_norm, snorm)
        still = _judge(answer, snorm, targets, settings) & pending
        stalled = still & (ratio > 0.5)
        answer.status[stalled] = int(Status.STAGNATED)
        pending = still & ~stalled
    answer.status[pending & _CONVERGED[answer.status]] = int(Status.STAGNATED)
    return answer


def _at_eps(eps: float) -> float:
    return 1e3 * eps


def _extra(g: Tensor | None) -> dict[str, Tensor]:
    return {} if g is None else {"g": g}


def _answer(op: Any, c: Tensor, g: Tensor | None, run: Run) -> tuple[Answer, Tensor]:
    r = c - op.mv(run.x)
    s = op.rmv(r)
    if g is not None:
        s = s + g
    return Answer(run.x, r, run.status, run.iterations, run.anorm, run.acond), s


def _judge(
    answer: Answer, snorm: np.ndarray, targets: Targets, settings: Settings
) -> np.ndarray:
    """Say which columns have ended, by their own estimates, and are not there by true residuals."""
    rnorm, xnorm = norms(answer.r), norms(answer.x)
    anorm, eps = answer.anorm, settings.eps
    # Beyond sqrt(eps) ||b|| the rounding of A x hides whether x is the minimiser at all.
    noise = eps * anorm * xnorm
    if targets.consistent:
        noise = np.where(noise <= np.sqrt(eps) * targets.bnorm, noise, 0.0)
    scale = settings.atol * rnorm + eps * (rnorm + targets.bnorm) + noise
    met = snorm <= _SLACK * anorm * scale
    if targets.consistent:
        met |= rnorm <= _SLACK * (settings.btol * targets.bnorm + settings.atol * anorm * xnorm)
    stalled = answer.status == int(Status.STAGNATED)
    answer.status[stalled & met] = int(Status.NORMAL_RESIDUAL_AT_EPS)
    answer.status[~(np.isfinite(snorm) & np.isfinite(xnorm))] = int(Status.NONFINITE)
    return (_CONVERGED[answer.status] | stalled) & ~met


def _merge(
    old: Answer, new: Answer, take: Tensor, better: np.ndarray, pending: np.ndarray
) -> Answer:
    return Answer(
        torch.where(take, new.x, old.x),
        torch.where(take, new.r, old.r),
        np.where(better, new.status, old.status),
        old.iterations + np.where(pending, new.iterations, 0),
        np.where(pending, np.fmax(old.anorm, new.anorm), old.anorm),
        np.where(pending, np.fmax(old.acond, new.acond), old.acond),
    )


def _reporter(settings: Settings, done: np.ndarray) -> Report | None:
    if settings.report is None:
        return None
    call, base = settings.report, int(done.max(initial=0))

    def report(count: int, active: np.ndarray, rnorm: np.ndarray, arnorm: np.ndarray) -> None:
        call(
            {
                "iteration": base + count,
                "active": active,
                "residual_norm": rnorm,
                "normal_residual_norm": arnorm,
            }
        )

    return report
