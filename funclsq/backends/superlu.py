"""SciPy's SuperLU as a Cholesky: symmetric mode, diagonal pivots, ordering kept per pattern."""

from __future__ import annotations

import threading

import numpy as np
import scipy  # its subpackages load on first use

from funclsq.backends.registry import NotPositive

__all__ = ["DTYPES", "NAME", "analyze"]

NAME = "superlu"
DTYPES = frozenset({"float64", "float32", "complex128", "complex64"})


class _Symbolic:
    """A pattern, and from the first factorisation on its minimum-degree order.

    The first factorisation finds the order; later ones get the matrix permuted beforehand,
    which saves SuperLU the search.
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray) -> None:
        self.indptr, self.indices, self.n = indptr, indices, indptr.size - 1
        self._lock = threading.Lock()
        self._permuted: tuple[np.ndarray, ...] | None = None
        self.work: tuple[float, float] | None = None  # known from the first factor on

    def factor(self, data: np.ndarray) -> _Factor:
        """Factor values on the pattern."""
        if self._permuted is None:
            lu = _splu(data, self.indices, self.indptr, "MMD_AT_PLUS_A")
            with self._lock:
                if self._permuted is None:
                    counts = np.diff(lu.L.indptr).astype(float)
                    self.work = (float(counts.sum()), float(counts @ counts))
                    self._permuted = _permute(self.indptr, self.indices, lu.perm_c)
            return _Factor(lu, None, data.itemsize)
        indptr, indices, source, order = self._permuted
        return _Factor(_splu(data[source], indices, indptr, "NATURAL"), order, data.itemsize)


class _Factor:
    def __init__(self, lu, order: np.ndarray | None, itemsize: int) -> None:
        self._lu, self._order = lu, order
        self.nbytes = lu.nnz * (4 + itemsize)

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve for a block of columns."""
        if rhs.shape[1] == 1:
            rhs = rhs[:, 0]
        if self._order is None:
            x = self._lu.solve(rhs)
        else:
            x = np.empty(rhs.shape, dtype=rhs.dtype)
            x[self._order] = self._lu.solve(rhs[self._order])
        return x.reshape(x.shape[0], -1)

    def positive(self) -> bool:
        """Whether the diagonal was taken as pivot throughout and came out positive."""
        lu = self._lu
        return bool((lu.U.diagonal().real > 0).all() and (lu.perm_r == lu.perm_c).all())


def analyze(indptr: np.ndarray, indices: np.ndarray) -> _Symbolic:
    """Take a pattern; its order is found with the first factorisation."""
    return _Symbolic(indptr, indices)


def _splu(data, indices, indptr, order):
    n = indptr.size - 1
    matrix = scipy.sparse.csc_array((data, indices, indptr), shape=(n, n))
    matrix.has_sorted_indices = True
    try:
        return scipy.sparse.linalg.splu(
            matrix, permc_spec=order, diag_pivot_thresh=0.0, options={"SymmetricMode": True}
        )
    except RuntimeError as error:  # "Factor is exactly singular"
        raise NotPositive(str(error)) from None


def _permute(indptr, indices, perm):
    """Pattern of P N P^T for SuperLU's ``perm_c``, with where each of its values comes from."""
    n = perm.size
    order = np.empty(n, dtype=np.intp)
    order[perm] = np.arange(n)  # row order[i] of N becomes row i
    column = np.repeat(np.arange(n), np.diff(indptr))
    number = np.arange(indices.size)
    coo = scipy.sparse.coo_array((number, (perm[indices], perm[column])), shape=(n, n))
    csc = coo.tocsc()
    csc.sort_indices()
    return (
        csc.indptr.astype(np.int32, copy=False),
        csc.indices.astype(np.int32, copy=False),
        csc.data,
        order,
    )
