"""Torch against JAX on the demo's own problem, and both against independent oracles on a patch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from funclsq import Sparse
from funclsq.demo.learn import Tick, log_error
from funclsq.demo.samples import Samples, Split
from funclsq.demo.terrain import LogWeights, Terrain
from funclsq.validate import Report, Row, cross_check

__all__ = ["PATCH", "against_jax", "against_oracles", "crop"]

PATCH = (16, 20)  # rows and columns that dense oracles can afford
_TOLERANCE = 1e-9


def against_jax(
    terrain: Terrain,
    validation: Samples,
    classes: np.ndarray,
    log_weights: LogWeights,
    tolerance: float | None = None,
    **settings: Any,
) -> Report:
    """Compare the validation error and its gradient, the whole problem in both frameworks."""
    title = f"the validation error of all {terrain.pattern.shape[1]:,} unknowns, torch and JAX"
    if importlib.util.find_spec("jax") is None:
        note = "skipped: JAX is not installed. Install it with pip install 'funclsq[jax]'."
        return Report(title, (), (note,))
    groups = torch.from_numpy(terrain.groups(classes))
    leaves = LogWeights(*(t.clone().requires_grad_() for t in log_weights))
    error = log_error(terrain.surface(leaves, groups, **settings), validation)
    slopes = torch.autograd.grad(error, leaves)
    other, other_slopes = _jax_value_and_grad(terrain, validation, groups, log_weights, settings)
    held = _TOLERANCE if tolerance is None else tolerance
    rows = [_row("error", error.detach(), other, held)]
    for name, mine, theirs in zip(LogWeights._fields, slopes, other_slopes):
        rows.append(_row(f"gradient, {name}", mine, theirs, held))
    return Report(title, tuple(rows))


def _jax_value_and_grad(
    terrain: Terrain,
    validation: Samples,
    groups: torch.Tensor,
    log_weights: LogWeights,
    settings: dict[str, Any],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Write the validation error again, in JAX, and differentiate it there."""
    import jax
    import jax.numpy as jnp

    import funclsq.jax as flj

    def log_error_jax(log_weights: LogWeights, groups: Any, values: Any, b: Any) -> Any:
        every = jnp.concatenate([t.ravel() for t in log_weights])
        weights = jnp.exp(every)[groups]
        A = flj.Sparse(terrain.pattern, values)
        surface = flj.lstsq(A, b, weights=weights, rank="full", **settings)
        total = 0.0
        for s in np.unique(validation.survey):
            part = validation.of(s)
            mean_square = jnp.mean((surface[part.points] - part.heights) ** 2)
            total += len(part) * jnp.log(mean_square)
        return total / (2 * len(validation))

    with jax.enable_x64(True):
        arrays = [jnp.asarray(t.numpy()) for t in (groups, terrain.values, terrain.b)]
        start = LogWeights(*(jnp.asarray(t.numpy()) for t in log_weights))
        error, slopes = jax.jit(jax.value_and_grad(log_error_jax))(start, *arrays)
        return np.asarray(error), [np.asarray(t) for t in slopes]


def _row(quantity: str, mine: torch.Tensor, theirs: np.ndarray, tolerance: float) -> Row:
    found, expected = mine.numpy(), np.asarray(theirs)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return Row(quantity, "torch", "jax", error, tolerance, "set for a whole problem; see --tol")


def crop(heights: np.ndarray, split: Split, size: tuple[int, int] = PATCH) -> tuple[Any, Samples]:
    raise NotImplementedError


def against_oracles(
    shape: tuple[int, int], log_weights: LogWeights, tick: Tick | Callable[[str], None]
) -> Report:
    raise NotImplementedError
