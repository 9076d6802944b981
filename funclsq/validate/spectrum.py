"""Extreme singular values of a problem's matrix, for step sizes and perturbations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from funclsq.validate.problem import Problem, stacked_svd

__all__ = ["extremes", "norm_estimate"]

_STEPS = 12


def extremes(problem: Problem, make_maps: Callable[[Problem], Any]) -> tuple[float, float]:
    """Return the largest and the smallest nonzero singular value of [W^(1/2) A; D] S.

    S scales the columns to unit length where A has full column rank.

    By an SVD where A is small enough for one; by power iterations otherwise, which are good to
    some ten percent.
    """
    largest, smallest = 0.0, np.inf
    for _, part in problem.column_problems():
        if not problem.rank:
            return 1.0, 1.0
        if problem.small:
            s = stacked_svd(part)[1]
            top, bottom = float(s[0]), float(s[problem.rank - 1])
        else:
            maps, n = make_maps(part), problem.shape[1]
            w, d2 = part.weights(), part.damping()[:, None] ** 2
            S = part.column_scale()[:, None]

            def gram(v: Any, A: Any = maps.A, w: Any = w, d2: Any = d2, S: Any = S) -> Any:
                return S * (A.conj().T @ (w * (A @ (S * v))) + d2 * S * v)

            def inverse(v: Any, E: Any = maps.E, S: Any = S) -> Any:
                return E(v / S) / S

            top = norm_estimate(gram, n) ** 0.5
            bottom = norm_estimate(inverse, n) ** -0.5
        largest, smallest = max(largest, top), min(smallest, bottom)
    return largest, smallest


def norm_estimate(hermitian: Callable[[np.ndarray], np.ndarray], n: int) -> float:
    """Return the 2-norm of a Hermitian operator on blocks of one column, from below."""
    v, size = np.cos(1.0 + np.arange(n))[:, None] ** 3, 0.0
    for _ in range(_STEPS):
        v = v / (np.linalg.norm(v) or 1.0)
        v = hermitian(v)
        size = float(np.linalg.norm(v))
    return size
