"""The maps of the closed form, applied by a dense SVD (LAPACK) truncated at the known rank."""

from __future__ import annotations

import numpy as np

from funclsq.validate.problem import Problem, stacked_svd

__all__ = ["DenseMaps"]


class DenseMaps:
    """T = V S^-1 U^H W^(1/2), E = V S^-2 V^H, N = I - V V^H with [W^(1/2) A; D] = U S V^H.

    Where the rank is n, the columns are scaled to unit length first (V is scaled back, and N is
    zero), so that badly scaled unknowns cost no accuracy.

    Where the rank is less than n, A is replaced by A V V^H, the nearest matrix of that rank (in
    the weighted norm), so that a perturbed A is moved back onto the matrices of fixed rank.

    Parameters
    ----------
    problem : Problem
        With weights that are the same for all columns, and of known rank.
    nudge : array, shape (m + n, n), optional
        Relative change of [W^(1/2) A; D] by columns, seen by the maps and not by A: what any
        solver that works on this matrix does to the answer, if the nudge is its rounding.
    """

    def __init__(self, problem: Problem, nudge: np.ndarray | None = None) -> None:
        u, s, vh = stacked_svd(problem, nudge)
        rank = problem.rank
        self._root = np.sqrt(problem.weights())
        self._u = u[: problem.shape[0], :rank]
        self._s = s[:rank, None]
        self._v = problem.column_scale()[:, None] * vh[:rank].conj().T
        self._full = rank == problem.shape[1]
        self.A = problem.toarray()
        if not self._full:
            self.A = (self.A @ self._v) @ self._v.conj().T

    def T(self, c: np.ndarray) -> np.ndarray:
        """Return G^+ A^H W c."""
        return self._v @ (self._u.conj().T @ (self._root * c) / self._s)

    def Th(self, g: np.ndarray) -> np.ndarray:
        """Return W A G^+ g."""
        return self._root * (self._u @ (self._v.conj().T @ g / self._s))

    def E(self, g: np.ndarray) -> np.ndarray:
        """Return G^+ g."""
        return self._v @ (self._v.conj().T @ g / self._s**2)

    def N(self, g: np.ndarray) -> np.ndarray:
        """Return g - G^+ G g, which is zero for full column rank."""
        return 0 * g if self._full else g - self._v @ (self._v.conj().T @ g)
