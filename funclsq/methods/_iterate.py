"""One run of a Krylov method over a block of columns: stopping, freezing, compaction.

Each column stops by its own tests. A column that has stopped is frozen (its x is not touched
again) and is dropped from the block once enough have stopped; members of a batch are only frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._scalars import FloatScalars, Scalars, scalars_for
from funclsq.methods._watch import XNORM_EVERY, DeviceWatch, HostWatch, Look, Tests, watch_for
from funclsq.solution import Status

__all__ = ["Run", "Targets", "iterate"]

_RUNNING = -1
_PATIENCE = 500  # steps without a new least ||A^H r|| (or as many as were made until it)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What ends a run: ||A^H r|| <= atol ||A|| ||r||, or ||r|| <= btol ||b|| + atol ||A|| ||x||.

    Parameters
    ----------
    atol, btol, conlim : float
        The tolerances; ``conlim`` may be infinite.
    at_eps : bool
        Whether atol and btol are the rounding level, which names the status.
    bnorm, xnorm, rnorm : ndarray, shape (..., k)
        ||b|| of the whole problem, of which the run may solve a correction, and ||x|| and ||r||
        before the run (0 for the first).
    xlimit : float
        Largest ||A|| ||x|| / ||b|| at which the rounding of A x still shows the residual. Beyond,
        A x = b is not tested.
    reduction : float
        A run also ends once ||A^H r|| is this fraction of what it was at its start.
    consistent : bool
        Whether A x = b is a test at all (it is not for a right-hand side g in the domain).
    bounded : bool
        Whether to stop beyond ``xlimit``: where A may have a null space, x is growing into it.
    """

    atol: float
    btol: float
    conlim: float
    at_eps: bool
    bnorm: np.ndarray
    xnorm: np.ndarray
    rnorm: np.ndarray
    xlimit: float
    reduction: float = 0.0
    consistent: bool = True
    bounded: bool = False


@dataclasses.dataclass
class Run:
    """Result of a run: x (..., n, k), and per column why and when it stopped, and estimates."""

    x: Tensor
    status: np.ndarray
    iterations: np.ndarray
    anorm: np.ndarray
    acond: np.ndarray


Report = Callable[[int, np.ndarray, np.ndarray, np.ndarray], bool]


def iterate(
    method: Callable[..., Any],
    op: Any,
    rhs: Tensor,
    targets: Targets,
    maxiter: int,
    report: Report | None = None,
    **extra: Any,
) -> Run:
    """Run ``method`` until every column has met its targets or ``maxiter`` steps are made.

    Parameters
    ----------
    method : callable
        ``method(op, rhs, scalars, **extra)`` gives the state of a method (Lsmr, ...).
    op : operator
        A, of shape (m, n).
    rhs : Tensor, shape (..., m, k)
        Right-hand sides.
    targets : Targets
        When to stop.
    maxiter : int
        Largest number of steps.
    report : callable, optional
        Called at every check with (iteration, active, ||r||, ||A^H r||); True ends the run.
    **extra
        Further arguments of ``method``: a preconditioner ``inverse``, a ``g``.

    Returns
    -------
    Run
        The result, one entry per column (and batch member).
    """
    scalars = scalars_for(rhs)
    state = method(op, rhs, scalars, **extra)
    if isinstance(scalars, FloatScalars):
        return _iterate_one(state, scalars, targets, maxiter, report)
    return _iterate_block(state, scalars, targets, maxiter, report)


def _iterate_one(
    state: Any, scalars: FloatScalars, targets: Targets, maxiter: int, report: Report | None
) -> Run:
    """Run one column with Python floats."""
    atol, conlim, bnorm = targets.atol, targets.conlim, float(targets.bnorm[0])
    floor, limit, xnorm = targets.btol * bnorm, targets.xlimit * bnorm, float(targets.xnorm[0])
    outer, best, since = float(targets.rnorm[0]), float("inf"), 0
    consistent = targets.consistent
    goal = targets.reduction * state.arnorm
    count, status, stop = 0, Status.START_SOLVES, False
    if not state.arnorm <= atol * state.anorm * max(state.rnorm, outer):
        status = Status.MAXITER
        for count in range(1, maxiter + 1):
            state.step()
            rnorm, arnorm, anorm = state.rnorm, state.arnorm, state.anorm
            if consistent and count % XNORM_EVERY == 0:
                xnorm = max(xnorm, scalars.norm(state.x))
            if report is not None:
                stop = report(count, np.array([True]), np.array([rnorm]), np.array([arnorm]))
            image = anorm * xnorm  # about ||A x||, or more where A x cancels
            if not rnorm + arnorm < float("inf"):
                status = Status.NONFINITE
            elif consistent and rnorm <= floor + (atol * image if image <= limit else 0.0):
                status = _name(Status.RESIDUAL_SMALL, targets)
            elif arnorm <= max(atol * anorm * max(rnorm, outer), goal):
                status = _name(Status.NORMAL_RESIDUAL_SMALL, targets)
            elif state.acond >= conlim:
                status = Status.CONDITION_LIMIT
            elif stop:
                status = Status.INTERRUPTED
            elif targets.bounded and image > limit:
                status = Status.STAGNATED
            elif arnorm < best:
                best, since = arnorm, count
                continue
            elif count > since + max(_PATIENCE, since):
                status = Status.STAGNATED
            else:
                continue
            break
    as_array = scalars.to_host
    return Run(
        state.x,
        np.array([int(status)]),
        np.array([count]),
        as_array(state.anorm),
        as_array(state.acond),
    )


def _name(status: Status, targets: Targets) -> Status:
    if not targets.at_eps:
        return status
    return {
        Status.RESIDUAL_SMALL: Status.RESIDUAL_AT_EPS,
        Status.NORMAL_RESIDUAL_SMALL: Status.NORMAL_RESIDUAL_AT_EPS,
    }[status]


@dataclasses.dataclass
class _Block:
    """What is known of the columns that are iterated on, arrays (..., k)."""

    columns: np.ndarray  # (k,), their places in the whole
    outer: np.ndarray  # as in Tests
    goal: np.ndarray
    floor: np.ndarray
    limit: np.ndarray
    best: np.ndarray  # least ||A^H r||
    since: np.ndarray  # the step that it is of
    running: np.ndarray

    def keep(self, chosen: np.ndarray) -> None:
        """Drop all but these."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name)[..., chosen])


def _iterate_block(
    state: Any, scalars: Scalars, targets: Targets, maxiter: int, report: Report | None
) -> Run:
    """Run many columns (and batch members) together."""
    k = state.x.shape[-1]
    shape = (*state.x.shape[:-2], k)
    out = Run(
        torch.zeros_like(state.x),
        np.full(shape, _RUNNING),
        np.zeros(shape, dtype=np.int64),
        np.zeros(shape),
        np.ones(shape),
    )
    rnorm, first, out.anorm[...] = scalars.all_to_host(state.rnorm, state.arnorm, state.anorm)
    scalars.told(rnorm, first, out.anorm)
    start = first <= targets.atol * out.anorm * np.fmax(targets.rnorm, rnorm)
    out.status[start] = int(Status.START_SOLVES)
    scalars.freeze(~start)
    count = 0
    with np.errstate(all="ignore"):
        tests = Tests(
            targets.atol,
            targets.consistent,
            targets.rnorm,
            targets.reduction * first,
            targets.btol * targets.bnorm,
            targets.xlimit * targets.bnorm,
        )
        watch = watch_for(state, scalars, tests, targets.xnorm)
        outer, goal, floor, limit = (np.broadcast_to(a, shape) for a in tests[2:])
        block = _Block(
            np.arange(k),
            outer,
            goal,
            floor,
            limit,
            np.full(shape, np.inf),
            np.zeros(shape, dtype=np.int64),
            ~start,
        )
        while count < maxiter and block.running.any():
            _compact(state, scalars, watch, out, block)
            for _ in range(min(scalars.check_every, maxiter - count)):
                state.step()
                watch.stepped()
                count += 1
            look = watch.look()
            status = _tested(look, targets, block, count)
            if report is not None:
                active = block.running & (status == _RUNNING)
                if report(count, active, look.rnorm, look.arnorm):
                    status = np.where(active, int(Status.INTERRUPTED), status)
            if count >= maxiter:
                status = np.where(status == _RUNNING, int(Status.MAXITER), status)
            going = status == _RUNNING
            if not going.all():
                _note(out, block, look, status)
                block.running = block.running & going
            if not np.array_equal(block.running, ~look.met):
                scalars.freeze(block.running)
    out.status[out.status == _RUNNING] = int(Status.MAXITER)  # no step was allowed
    out.x[..., block.columns] = state.x
    return out


def _tested(look: Look, targets: Targets, block: _Block, count: int) -> np.ndarray:
    """Apply the stopping tests to all columns of the block, those that have stopped as well."""
    fell = look.arnorm < block.best
    block.best = np.where(fell, look.arnorm, block.best)
    block.since = np.where(fell, count, block.since)
    stalled = count > block.since + np.maximum(_PATIENCE, block.since)
    status = np.full(fell.shape, _RUNNING)
    image = look.anorm * look.xnorm  # about ||A x||, or more where A x cancels
    blown = image > block.limit
    finite = look.rnorm + look.arnorm < np.inf
    status[stalled | (blown & targets.bounded)] = int(Status.STAGNATED)
    status[look.acond >= targets.conlim] = int(Status.CONDITION_LIMIT)
    level = targets.atol * look.anorm * np.fmax(look.rnorm, block.outer)
    small = (look.arnorm <= np.fmax(level, block.goal)) | look.met
    status[small] = int(_name(Status.NORMAL_RESIDUAL_SMALL, targets))
    if targets.consistent:
        solved = look.rnorm <= block.floor + np.where(blown, 0.0, targets.atol * image)
        status[solved] = int(_name(Status.RESIDUAL_SMALL, targets))
    status[~finite] = int(Status.NONFINITE)
    return status


def _note(out: Run, block: _Block, look: Look, status: np.ndarray) -> None:
    """Write down what was found of the columns that stop now."""
    stop = block.running & (status != _RUNNING)
    for whole, part in (
        (out.status, status),
        (out.iterations, look.steps),
        (out.anorm, look.anorm),
        (out.acond, look.acond),
    ):
        whole[..., block.columns] = np.where(stop, part, whole[..., block.columns])


def _compact(
    state: Any, scalars: Any, watch: HostWatch | DeviceWatch, out: Run, block: _Block
) -> None:
    """Drop the columns that have stopped (in every member) once they are a quarter of the block."""
    count = len(block.columns)
    running = block.running.reshape(-1, count).any(axis=0)
    if running.sum() * 4 > count * 3:
        return
    device = state.x.device
    going, stopped = (
        torch.from_numpy(np.flatnonzero(which)).to(device) for which in (running, ~running)
    )
    out.x[..., block.columns[~running]] = state.x.index_select(-1, stopped)
    state.keep(going)
    watch.keep(going)
    block.keep(running)
    scalars.freeze(block.running)
