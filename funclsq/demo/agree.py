"""Torch against JAX on the demo's own problem, and both against independent oracles on a patch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import Sparse
from funclsq.demo.learn import log_error
from funclsq.demo.samples import Samples, draw
from funclsq.demo.terrain import LogWeights, Terrain
from funclsq.validate import Report, Row, cross_check

__all__ = ["against_jax", "against_oracles"]

_PATCH = (12, 16)  # rows and columns that dense oracles can afford
_PATCH_SHARE = 0.2
_TOLERANCE = 1e-9


def against_jax(
    terrain: Terrain,
    validation: Samples,
    classes: np.ndarray,
    log_weights: LogWeights,
    tolerance: float | None = None,
    **settings: Any,
) -> Report:
    """Compare the validation error and its gradient on the whole problem, torch with JAX.

    Parameters
    ----------
    terrain, validation, classes, log_weights
        The problem, and where it is differentiated.
    tolerance : float, optional
        The largest relative difference that passes; 1e-9 by default.
    **settings
        Passed to both ``lstsq``.
    """
    title = f"validation error and gradient, {terrain.pattern.shape[1]:,} unknowns: torch, JAX"
    if importlib.util.find_spec("jax") is None:
        note = "skipped: JAX is not installed. Install it with pip install 'funclsq[jax]'."
        return Report(title, (), (note,))
    groups = torch.from_numpy(terrain.groups(classes))
    leaves = LogWeights(*(t.clone().requires_grad_() for t in log_weights))
    error = log_error(terrain.surface(leaves, groups, **settings), validation)
    slopes = torch.autograd.grad(error, list(leaves))
    theirs = _jax_value_and_grad(terrain, validation, groups, log_weights, settings)
    names = ("value", *(f"gradient, {name}" for name in LogWeights._fields))
    held = _TOLERANCE if tolerance is None else tolerance
    rows = (
        _row(name, mine, their, held)
        for name, mine, their in zip(names, (error.detach(), *slopes), theirs)
    )
    return Report(title, tuple(rows))


def _jax_value_and_grad(
    terrain: Terrain,
    validation: Samples,
    groups: Tensor,
    log_weights: LogWeights,
    settings: dict[str, Any],
) -> list[np.ndarray]:
    """Write the validation error again, in JAX, and differentiate it there."""
    import jax
    import jax.numpy as jnp

    import funclsq.jax as flj
    from funclsq.validate._jax_side import x64

    def log_error_jax(log_weights: LogWeights, groups: Any, values: Any, b: Any) -> Any:
        every = jnp.concatenate([t.ravel() for t in log_weights])
        weights = jnp.exp(every)[groups]
        A = flj.Sparse(terrain.pattern, values)
        surface = flj.lstsq(A, b, weights=weights, rank="full", **settings)
        total = 0.0
        for survey in np.unique(validation.survey):
            part = validation.of(survey)
            mean_square = jnp.mean((surface[part.points] - part.heights) ** 2)
            total += len(part) * jnp.log(mean_square)
        return total / (2 * len(validation))

    with x64(True):
        arrays = [jnp.asarray(t.numpy()) for t in (groups, terrain.values, terrain.b)]
        start = LogWeights(*(jnp.asarray(t.numpy()) for t in log_weights))
        error, slopes = jax.jit(jax.value_and_grad(log_error_jax))(start, *arrays)
        return [np.asarray(t) for t in (error, *slopes)]


def _row(quantity: str, mine: Tensor, theirs: np.ndarray, tolerance: float) -> Row:
    error = float(np.linalg.norm(mine.numpy() - theirs) / np.linalg.norm(theirs))
    return Row(quantity, "torch", "jax", error, tolerance, "relative, of the whole array")


def against_oracles(
    heights: np.ndarray,
    classes: np.ndarray,
    log_weights: LogWeights,
    oracles: Sequence[str],
    **settings: Any,
) -> Report:
    """Cross-check x and its derivatives on a corner of the map, small enough for dense oracles.

    Parameters
    ----------
    heights, classes : array, shape (rows, columns)
        Of the whole map.
    log_weights : LogWeights
        Where everything is differentiated.
    oracles : sequence of str
        Some of :data:`funclsq.validate.ORACLES`.
    **settings
        Passed to :func:`funclsq.validate.cross_check`.
    """
    corner = tuple(slice(0, size) for size in _PATCH)
    fit = draw(heights[corner], _PATCH_SHARE).fit
    terrain = Terrain.assemble(_PATCH, fit)
    # Classes are numbered for the whole map: keep that numbering, whichever occur in the corner.
    groups = terrain.groups(classes[corner], count=log_weights.smoothness.shape[1])
    weights = torch.cat([t.flatten() for t in log_weights]).exp()[torch.from_numpy(groups)]
    return cross_check(
        Sparse(terrain.pattern, terrain.values),
        terrain.b,
        weights=weights,
        oracles=oracles,
        **settings,
    )
