"""Learn the smoothing weights: gradient descent on the validation error through the solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import Sparse, lstsq
from funclsq.demo.terrain import CURVATURE, KINDS, Samples, Terrain

__all__ = ["Search", "descend", "log_error", "one_weight", "reconstruct"]

_SLOPE = 0.01  # weight of slope rows beside curvature rows where learning starts
_PULL = 5e-4


@dataclasses.dataclass(frozen=True)
class Search:
    """Where a search ended: log weights (kinds, classes), their surface, and the way there.

    ``errors`` holds the validation error (RMS, metres) of every solve made.
    """

    log_weights: Tensor
    surface: Tensor
    errors: tuple[float, ...]


def reconstruct(terrain: Terrain, log_weights: Tensor, rows: Tensor, **settings: Any) -> Tensor:
    """argmin_x ||W^(1/2)(A x - b)||^2: the surface, in metres; differentiable in log_weights.

    Parameters
    ----------
    terrain : Terrain
        A and b.
    log_weights : Tensor, shape (kinds, classes)
        Logarithms of the smoothness weights; -inf leaves a kind of row out.
    rows : int Tensor, shape (smoothness rows,)
        Which entry of the flattened ``log_weights`` each row takes.
    **settings
        Passed to :func:`funclsq.lstsq`.
    """
    samples = log_weights.new_ones(terrain.samples)
    weights = torch.cat([samples, log_weights.exp().flatten()[rows]])
    A = Sparse(terrain.pattern, terrain.values)
    return lstsq(A, terrain.b, weights=weights, rank="full", **settings)


def log_error(surface: Tensor, samples: Samples) -> Tensor:
    """Logarithm of the mean squared error at the samples."""
    return samples.error(surface).square().mean().log()


def one_weight(
    terrain: Terrain,
    validation: Samples,
    strengths: np.ndarray,
    tick: Callable[[str], None],
    **settings: Any,
) -> Search:
    """Try each strength as the single weight of a thin plate; the best on validation wins."""
    plate = torch.tensor(list(CURVATURE.values()), dtype=torch.float64)[:, None]
    rows = torch.from_numpy(terrain.rows(np.zeros(terrain.shape, int)))
    found, errors = [], []
    for strength in strengths:
        log_weights = (strength * plate).log()
        surface = reconstruct(terrain, log_weights, rows, **settings)
        errors.append(_rms(log_error(surface, validation)))
        found.append((log_weights, surface))
        tick(f"weight {strength:.0e}: {errors[-1]:.2f} m")
    return Search(*found[int(np.argmin(errors))], tuple(errors))


def descend(
    terrain: Terrain,
    validation: Samples,
    start: Tensor,
    classes: np.ndarray,
    steps: int,
    tick: Callable[[str], None],
    **settings: Any,
) -> Search:
    """Minimise the validation error over one log weight per kind and class, by L-BFGS.

    A faint pull towards the start keeps weights that the samples say nothing about in place.
    Every step is one solve and one backward pass, which reuses the factor of the solve.

    Parameters
    ----------
    terrain, validation
        The problem, and what its solution is judged by.
    start : Tensor, shape (kinds, 1)
        Log weights to start from; rows that are left out there (-inf) start small.
    classes : int array, shape (rows, columns)
        Terrain class of every grid point.
    steps : int
        The most solves that are made.
    tick : callable
        Called with a line of text after every solve.
    """
    rows = torch.from_numpy(terrain.rows(classes))
    curvature = start[list(KINDS).index("xx")]
    start = torch.where(start.isinf(), curvature + np.log(_SLOPE), start)
    start = start.repeat(1, int(classes.max()) + 1)
    log_weights = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [log_weights], max_iter=steps, max_eval=steps, line_search_fn="strong_wolfe"
    )
    best: list[Any] = [np.inf, None, None]
    errors: list[float] = []

    def closure() -> Tensor:
        optimiser.zero_grad()
        surface = reconstruct(terrain, log_weights, rows, **settings)
        error = log_error(surface, validation)
        loss = error + _PULL * (log_weights - start).square().sum()
        loss.backward()
        if loss.item() < best[0]:
            best[:] = loss.item(), log_weights.detach().clone(), surface.detach()
        errors.append(_rms(error))
        tick(f"step {len(errors)}: {errors[-1]:.2f} m")
        return loss

    optimiser.step(closure)
    return Search(best[1], best[2], tuple(errors))


def _rms(log_error: Tensor) -> float:
    return float(log_error.detach().div(2).exp())
