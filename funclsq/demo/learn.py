"""Learn the weights: gradient descent on the validation error through the solve."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.demo.samples import SURVEYS, Samples
from funclsq.demo.terrain import KINDS, THIN_PLATE, LogWeights, Terrain

__all__ = ["Search", "descend", "log_error", "start_from", "try_one_weight"]

_SLOPE = 0.01  # weight of slope beside curvature where learning starts
_SPREAD = 1.2  # by how much log weights may differ from the start's, a priori

Tick = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Search:
    """Where a search ended: weights, their surface, and the validation error of every solve."""

    log_weights: LogWeights
    surface: Tensor
    errors: tuple[float, ...]


class _Enough(Exception):
    """Ends a descent after its last step."""


def log_error(surface: Tensor, samples: Samples) -> Tensor:
    """Mean log error, sum_s (n_s / 2 n) log(mean square error at the samples of survey s).

    Up to a constant, the negative log likelihood per sample of heights whose noise is Gaussian,
    with a variance of its own, unknown and fitted, for each survey.
    """
    parts = [samples.of(s) for s in range(len(SURVEYS))]
    terms = [len(part) * part.mean_square(surface).log() for part in parts if len(part)]
    return torch.stack(terms).sum() / (2 * len(samples))


def try_one_weight(
    terrain: Terrain, validation: Samples, strengths: np.ndarray, tick: Tick, **settings: Any
) -> Search:
    """Try each strength as the single weight of a thin plate; the best on validation wins."""
    groups = torch.from_numpy(terrain.groups(np.zeros(terrain.shape, int)))
    plate = torch.tensor(THIN_PLATE, dtype=torch.float64)[:, None]
    trust = torch.zeros(len(SURVEYS), dtype=torch.float64)
    found, errors = [], []
    for strength in strengths:
        log_weights = LogWeights(trust, (strength * plate).log())
        surface = terrain.surface(log_weights, groups, **settings)
        errors.append(float(log_error(surface, validation).exp()))
        found.append((log_weights, surface))
        tick(f"weight {strength:.0e}: {errors[-1]:.2f} m")
    return Search(*found[int(np.argmin(errors))], tuple(errors))


def start_from(log_weights: LogWeights, count: int) -> LogWeights:
    """Give each of ``count`` classes the weights of one; kinds that were left out start small."""
    smoothness = log_weights.smoothness
    small = smoothness[list(KINDS).index("xx")] + np.log(_SLOPE)
    smoothness = torch.where(smoothness.isinf(), small, smoothness)
    return log_weights._replace(smoothness=smoothness.repeat(1, count))


def descend(
    terrain: Terrain,
    validation: Samples,
    classes: np.ndarray,
    start: LogWeights,
    steps: int,
    tick: Tick,
    *,
    surveys: bool,
    **settings: Any,
) -> Search:
    """Minimise the validation error over the log weights by L-BFGS.

    A faint pull towards the start's ratios keeps weights in place that the samples say nothing
    about. Each step is one solve and one backward pass, which reuses the factor of the solve.

    Parameters
    ----------
    terrain, validation
        The problem, and what its solution is judged by.
    classes : int array, shape (rows, columns)
        Terrain class of every grid point.
    start : LogWeights
        Where to start.
    steps : int
        The most solves that are made.
    tick : callable
        Called with a line of text after every solve.
    surveys : bool
        Whether the weights of the surveys are learnt too.
    **settings
        Passed to :func:`funclsq.lstsq`.
    """
    groups = torch.from_numpy(terrain.groups(classes))
    log_weights = LogWeights(*(t.clone() for t in start))
    learnt = list(log_weights if surveys else log_weights[1:])
    for t in learnt:
        t.requires_grad_()
    optimiser = torch.optim.LBFGS(
        learnt, max_iter=steps, max_eval=steps, line_search_fn="strong_wolfe"
    )
    best: list[Any] = [np.inf, None, None]
    errors: list[float] = []

    def objective() -> Tensor:
        if len(errors) == steps:  # a line search alone would go on beyond max_eval
            raise _Enough
        optimiser.zero_grad()
        surface = terrain.surface(log_weights, groups, **settings)
        error = log_error(surface, validation)
        moved = log_weights.smoothness - start.smoothness
        pull = (moved - moved.mean()).square().sum() / (2 * _SPREAD**2 * len(validation))
        loss = error + pull
        loss.backward()
        if loss.item() < best[0]:
            best[:] = loss.item(), LogWeights(*(t.detach().clone() for t in log_weights)), surface
        errors.append(float(error.detach().exp()))
        tick(f"step {len(errors)}: {errors[-1]:.2f} m")
        return loss

    with contextlib.suppress(_Enough):
        optimiser.step(objective)
    return Search(best[1], best[2].detach(), tuple(errors))
