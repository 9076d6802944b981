"""CHOLMOD through scikit-sparse, where SuiteSparse is installed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import scipy  # its subpackages load on first use
from sksparse import cholmod

from funclsq.backends.registry import NotPositive

__all__ = ["DTYPES", "NAME", "analyze"]

NAME = "cholmod"
DTYPES = frozenset({"float64", "complex128"})


class _Symbolic:
    def __init__(self, indptr: np.ndarray, indices: np.ndarray) -> None:
        self._indptr, self._indices, self._n = indptr, indices, indptr.size - 1
        self._lock = threading.Lock()
        self._analysed: dict[str, object] = {}  # by dtype

    def factor(self, data: np.ndarray) -> _Factor:
        """Factor values on the pattern."""
        matrix = scipy.sparse.csc_matrix(
            (data, self._indices, self._indptr), shape=(self._n, self._n)
        )
        with self._lock:
            symbolic = self._analysed.get(data.dtype.name)
            if symbolic is None:
                symbolic = self._analysed[data.dtype.name] = _analyse(matrix)
            try:
                solve = _numeric(symbolic, matrix)
            except cholmod.CholmodNotPositiveDefiniteError as error:
                raise NotPositive(str(error)) from None
        return _Factor(solve, data.itemsize * data.size)


class _Factor:
    def __init__(self, solve: Callable[[np.ndarray], np.ndarray], nbytes: int) -> None:
        self._solve, self.nbytes = solve, 4 * nbytes  # the fill is not told without a copy
        self._lock = threading.Lock()

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve for a block of columns."""
        with self._lock:
            return self._solve(rhs)

    def positive(self) -> bool:
        """Always: CHOLMOD stops at a pivot that is not positive."""
        return True


# scikit-sparse 0.5 renamed everything

if hasattr(cholmod, "CholeskyFactor"):

    def _analyse(matrix):
        return cholmod.CholeskyFactor(matrix)

    def _numeric(symbolic, matrix):
        factor = symbolic.copy()
        factor.factorize(matrix)
        return factor.solve

else:

    def _analyse(matrix):
        return cholmod.analyze(matrix)

    def _numeric(symbolic, matrix):
        factor = symbolic.cholesky(matrix)
        factor.D()  # forces the factorisation's verdict to be raised here
        return factor.solve_A


def analyze(indptr: np.ndarray, indices: np.ndarray) -> _Symbolic:
    """Take a pattern; it is analysed with the first values, whose type CHOLMOD asks for."""
    return _Symbolic(indptr, indices)
