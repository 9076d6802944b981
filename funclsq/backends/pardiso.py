"""MKL PARDISO through pypardiso: the fastest refactorisation on x86, where MKL is installed.

One PARDISO handle holds one factor, so the order found first is handed to the later handles.
Concurrent runs were seen to give wrong solutions: every call takes one lock.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
import scipy  # its subpackages load on first use
from pypardiso import PyPardisoSolver

from funclsq.backends.registry import NotPositive

__all__ = ["DTYPES", "NAME", "analyze"]

NAME = "pardiso"
DTYPES = frozenset({"float64"})

_POSITIVE_DEFINITE = 2  # PARDISO's code for the matrix type
_PERM, _ORDERING = 5, 2  # its settings, numbered from 1
_ANALYSE_FACTOR, _SOLVE, _FREE = 12, 33, -1  # its phases
_lock = threading.RLock()  # a collected factor may be freed while another is at work

PyPardisoSolver()  # an ImportError here if MKL is not found


class _Symbolic:
    def __init__(self, indptr: np.ndarray, indices: np.ndarray) -> None:
        n = indptr.size - 1
        row = np.repeat(np.arange(n, dtype=indices.dtype), np.diff(indptr))
        self._upper = np.flatnonzero(indices >= row)
        counts = np.bincount(row[self._upper], minlength=n)
        self._indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self._indices = indices[self._upper].astype(np.int32)
        self._order: np.ndarray | None = None

    def factor(self, data: np.ndarray) -> _Factor:
        """Factor values on the pattern."""
        n = self._indptr.size - 1
        matrix = scipy.sparse.csr_matrix(
            (data[self._upper], self._indices, self._indptr), shape=(n, n)
        )
        solver = PyPardisoSolver(mtype=_POSITIVE_DEFINITE)
        solver.set_iparm(1, 1)  # the settings below, and PARDISO's defaults for 0
        solver.set_iparm(_ORDERING, 2)  # nested dissection
        solver.iparm[9] = 8
        with _lock:
            solver.set_iparm(_PERM, 2 if self._order is None else 1)
            solver.perm = np.zeros(n, np.int32) if self._order is None else self._order.copy()
            solver.set_phase(_ANALYSE_FACTOR)
            try:
                solver._call_pardiso(matrix, np.zeros((n, 1)))
            except Exception as error:
                _free(solver, matrix)
                raise NotPositive(str(error)) from None
            if self._order is None:
                self._order = solver.perm.copy()
        return _Factor(solver, matrix)


class _Factor:
    def __init__(self, solver: PyPardisoSolver, matrix: scipy.sparse.csr_matrix) -> None:
        self._solver, self._matrix = solver, matrix
        self.nbytes = int(solver.iparm[17]) * 8  # entries of the factor
        weakref.finalize(self, _free, solver, matrix)

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve for a block of columns."""
        with _lock:
            self._solver.set_phase(_SOLVE)
            return self._solver._call_pardiso(self._matrix, np.asfortranarray(rhs))

    def positive(self) -> bool:
        """Always: PARDISO stops at a pivot that is not positive."""
        return True


def _free(solver: PyPardisoSolver, matrix: scipy.sparse.csr_matrix) -> None:
    with _lock:
        solver.set_phase(_FREE)
        solver._call_pardiso(matrix, np.zeros((matrix.shape[0], 1)))


def analyze(indptr: np.ndarray, indices: np.ndarray) -> _Symbolic:
    """Take a pattern; its order is found with the first factorisation."""
    return _Symbolic(indptr, indices)
