"""The maps of the closed form for large sparse A: a sparse factorisation, refined, or LSMR.

Neither shares code with funclsq's solvers: the factor is SciPy's SuperLU of the scaled normal
matrix, used only as the inner solver of an iterative refinement of the augmented system

    [ I    B  ] [s]   [f]
    [ B^H -D^2] [y] = [h],        B = W^(1/2) A,

with residuals in extended precision, which removes the error of the normal equations (Björck
1967, doi:10.1007/BF01933489). For A without full column rank SciPy's LSMR gives the minimum-norm
solutions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.linalg import lsmr, splu

from funclsq.validate.problem import Problem

__all__ = ["FactoredMaps", "KrylovMaps", "SparseMaps"]

_SWEEPS = 60
_EPS = np.finfo(float).eps


class SparseMaps:
    """Makes the maps of large problems that lie close together, from one factorisation.

    ``SparseMaps()(problem)`` returns :class:`FactoredMaps` where A has full column rank, or
    damping, and :class:`KrylovMaps` otherwise. The factor of one problem refines the solutions
    of the next; a new one is made only where that does not converge.
    """

    def __init__(self) -> None:
        self._factor: Any = None

    def __call__(self, problem: Problem) -> FactoredMaps | KrylovMaps:
        """Return the maps of this problem."""
        if not problem.full_column_rank:
            return KrylovMaps(problem)
        if self._factor is not None:
            maps = FactoredMaps(problem, self._factor)
            try:
                maps.T(np.ones((problem.shape[0], 1)))
            except ArithmeticError:
                self._factor = None
            else:
                return maps
        maps = FactoredMaps(problem)
        self._factor = maps.factor
        return maps


class FactoredMaps:
    """The maps by refinement of the augmented system; A of full column rank, or damped.

    Parameters
    ----------
    problem : Problem
        With weights that are the same for all columns.
    factor : optional
        The ``factor`` of the maps of a problem close by, in place of its own.

    Raises
    ------
    ArithmeticError
        If the refinement does not converge: cond(A) is above about 1e7.
    """

    def __init__(self, problem: Problem, factor: Any = None) -> None:
        self.A = scipy.sparse.csr_array(problem.scattered(problem.inputs["A"]))
        self._root, d2 = np.sqrt(problem.weights()), problem.damping() ** 2
        B = (scipy.sparse.diags_array(self._root[:, 0]) @ self.A).tocsr()
        self.factor = factor or _factor(B, d2)
        long = np.clongdouble if np.iscomplexobj(B) else np.longdouble
        self._B, self._Bh = B.astype(long), B.conj().T.tocsr().astype(long)
        self._d2 = d2[:, None].astype(np.longdouble)

    def T(self, c: np.ndarray) -> np.ndarray:
        """Return G^+ A^H W c."""
        return self._augmented(self._root * c, None)[1]

    def Th(self, g: np.ndarray) -> np.ndarray:
        """Return W A G^+ g."""
        return -self._root * self._augmented(None, -g)[0]

    def E(self, g: np.ndarray) -> np.ndarray:
        """Return G^+ g."""
        return self._augmented(None, -g)[1]

    def N(self, g: np.ndarray) -> np.ndarray:
        """Return zero: A has full column rank."""
        return 0 * g

    def _augmented(self, f: Any, h: Any) -> tuple[np.ndarray, np.ndarray]:
        m, n = self._B.shape
        k = (h if f is None else f).shape[1]
        f = np.zeros((m, k), self._B.dtype) if f is None else f.astype(self._B.dtype)
        h = np.zeros((n, k), self._B.dtype) if h is None else h.astype(self._B.dtype)
        s, y = np.zeros_like(f), np.zeros_like(h)
        size, last, first = np.inf, np.inf, 0.0
        for _ in range(_SWEEPS):
            top = f - s - self._B @ y
            bottom = h - self._Bh @ s + self._d2 * y
            y_step = self._normal_solve(self._Bh @ top - bottom)
            s_step = top - self._B @ y_step
            s, y = s + s_step, y + y_step
            last, size = size, max(_ratio(s_step, s, f), _ratio(y_step, y))
            first = first or _norm(y_step)
            diverges = _norm(y_step) > 1e4 * first
            if size < _EPS or diverges or (size > last / 2 and last < 1e-3):
                break
        if size < 1e3 * _EPS:
            return self._rounded(s), self._rounded(y)
        raise ArithmeticError(
            f"validate: refinement of the sparse oracle stopped at relative steps of {size:.1e}; "
            "cond(A) is too large for it. Damp the problem, or pass oracles= without it."
        )

    def _normal_solve(self, rhs: np.ndarray) -> np.ndarray:
        lu, scale = self.factor
        return scale * lu.solve(scale * self._rounded(rhs))

    def _rounded(self, a: np.ndarray) -> np.ndarray:
        return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64)


def _factor(B: Any, d2: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return SuperLU's factor of S (B^H B + D^2) S and the scaling S, shape (n, 1)."""
    normal = (B.conj().T @ B + scipy.sparse.diags_array(d2)).tocsc()
    scale = 1 / np.sqrt(np.maximum(normal.diagonal().real, np.finfo(float).tiny))
    S = scipy.sparse.diags_array(scale)
    lu = splu(
        (S @ normal @ S).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
    return lu, scale[:, None]


class KrylovMaps:
    """The maps by SciPy's LSMR, run to rounding; for A of any rank, well conditioned on it."""

    def __init__(self, problem: Problem) -> None:
        self.A = scipy.sparse.csr_array(problem.scattered(problem.inputs["A"]))
        self._root = np.sqrt(problem.weights())
        rows = [scipy.sparse.diags_array(self._root[:, 0]) @ self.A]
        if problem.damping().any():
            rows.append(scipy.sparse.diags_array(problem.damping()))
        self._m = problem.shape[0]
        self._M = scipy.sparse.vstack(rows).tocsr()
        self._Mh = self._M.conj().T.tocsr()

    def T(self, c: np.ndarray) -> np.ndarray:
        """Return G^+ A^H W c."""
        padded = np.zeros((self._M.shape[0], c.shape[1]), c.dtype)
        padded[: self._m] = self._root * c
        return _min_norm(self._M, padded)

    def Th(self, g: np.ndarray) -> np.ndarray:
        """Return W A G^+ g."""
        return self._root * _min_norm(self._Mh, g)[: self._m]

    def E(self, g: np.ndarray) -> np.ndarray:
        """Return G^+ g."""
        return _min_norm(self._M, _min_norm(self._Mh, g))

    def N(self, g: np.ndarray) -> np.ndarray:
        """Return g - G^+ G g."""
        return g - self._Mh @ _min_norm(self._Mh, g)


def _min_norm(A: Any, rhs: np.ndarray) -> np.ndarray:
    if not rhs.shape[1]:
        return np.zeros((A.shape[1], 0))
    return np.stack(
        [lsmr(A, c, atol=0, btol=0, conlim=0, maxiter=20 * min(A.shape))[0] for c in rhs.T], axis=1
    )


def _ratio(step: np.ndarray, *whole: np.ndarray) -> float:
    """Return the norm of a step over the largest norm of what it changes."""
    top = _norm(step)
    return top / max(_norm(a) for a in whole) if top else 0.0


def _norm(a: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.complex128)))
