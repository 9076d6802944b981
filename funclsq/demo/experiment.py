"""The demo from data to table: sample, search, learn, check, judge."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from funclsq.demo import agree
from funclsq.demo.elevation import Elevation, load
from funclsq.demo.learn import Search, descend, start_from, try_one_weight
from funclsq.demo.samples import Split, draw
from funclsq.demo.terrain import LogWeights, Terrain, classes
from funclsq.validate import Report

__all__ = ["CLASSES", "Demo", "count_ticks", "run"]

CLASSES = ("flat", "rolling", "steep")
_LEVELS = (1 / 3, 2 / 3)
_STRENGTHS = np.logspace(-3, 1.5, 10)
_STEPS = (8, 10)  # solves to learn the smoothness weights, then all weights


@dataclasses.dataclass(frozen=True)
class Demo:
    """What was measured, reconstructed and found out; see :mod:`funclsq.demo.findings`.

    ``single`` is the best single weight, ``smooth`` has the smoothness weights learnt, ``both``
    those and the surveys'.
    """

    elevation: Elevation
    split: Split
    terrain: Terrain
    classes: np.ndarray
    strengths: np.ndarray
    single: Search
    smooth: Search
    both: Search
    reports: tuple[Report, ...]
    seconds: float

    @property
    def good(self) -> bool:
        """Whether every comparison that was made passed."""
        return not any(report.failures for report in self.reports)

    @property
    def better(self) -> bool:
        """Whether the learnt weights beat the best single one on the test samples."""
        test = self.split.test
        return bool(test.mean_square(self.both.surface) < test.mean_square(self.single.surface))

    def error(self, surface: Tensor) -> np.ndarray:
        """Surface minus truth, metres, on the grid."""
        return surface.numpy().reshape(self.elevation.shape) - self.elevation.heights


def count_ticks() -> int:
    """How often :func:`run` calls ``tick``."""
    return len(_STRENGTHS) + sum(_STEPS) + 2


def run(
    *,
    quick: bool = False,
    seed: int = 0,
    tolerance: float | None = None,
    tick: Callable[[str], None] = lambda text: None,
    solver: str = "cholesky",
    **settings: Any,
) -> Demo:
    """Rebuild a real surface from 5% of its heights, with weights learnt through the solve.

    Parameters
    ----------
    quick : bool
        Only a crop of the map, and one oracle instead of two.
    seed : int
        Of the samples: where they are, their survey, their noise.
    tolerance : float, optional
        Of the comparison of torch with JAX.
    tick : callable
        Called with a line of text after each of :func:`count_ticks` parts of the work.
    solver : str
        Of every solve.
    **settings
        Passed on to every :func:`funclsq.lstsq`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ConvergenceError
        If a solve on the way does not meet its tolerance.
    """
    began = time.perf_counter()
    settings = {"solver": solver, **settings}
    strict = {**settings, "on_failure": "raise"}
    elevation = load(quick=quick)
    split = draw(elevation.heights, seed=seed)
    terrain = Terrain.assemble(elevation.shape, split.fit)
    single = try_one_weight(terrain, split.validation, _STRENGTHS, tick, **strict)
    steepness = classes(single.surface.numpy().reshape(elevation.shape), _LEVELS)

    def learn(start: LogWeights, steps: int, surveys: bool) -> Search:
        judge = split.validation
        return descend(terrain, judge, steepness, start, steps, tick, surveys=surveys, **strict)

    smooth = learn(start_from(single.log_weights, len(CLASSES)), _STEPS[0], surveys=False)
    both = learn(smooth.log_weights, _STEPS[1], surveys=True)
    tick("torch against JAX")
    whole = agree.against_jax(
        terrain, split.validation, steepness, both.log_weights, tolerance, **settings
    )
    tick("both against oracles")
    oracles = ("closed form",) if quick else ("closed form", "autodiff")
    patch = agree.against_oracles(
        elevation.heights, steepness, both.log_weights, oracles, **settings
    )
    return Demo(
        elevation,
        split,
        terrain,
        steepness,
        _STRENGTHS,
        single,
        smooth,
        both,
        (whole, patch),
        time.perf_counter() - began,
    )
