"""rslab: a supernodal L D L^T in Rust, with the analysis kept per pattern.

Its default ordering races several, which takes 2 to 6 times as long as one of them. Minimum fill
alone is as quick to find as minimum degree, and its factor takes 0.43 to 1.17 times the flops: less
than 0.9 on eleven of 27 problems (grids, regression, linear programmes), more than 1.05 on two.
"""

from __future__ import annotations

import functools

import numpy as np
import scipy  # its subpackages load on first use
import torch

from funclsq.backends.lasting import lasting_import
from funclsq.backends.registry import NotPositive

__all__ = ["DTYPES", "NAME", "analyze"]

# Its allocator hands memory back to the system after each factorisation. To get it anew, cleared
# page by page, took up to a quarter of the time of a solve in a virtual machine. So the system is
# told that it may take the memory, which stays for the next factorisation until the system does.
rslab = lasting_import("rslab", MIMALLOC_PURGE_DECOMMITS="0")

NAME = "rslab"
DTYPES = frozenset({"float64", "float32"})  # its complex path is for A = A^T, not Hermitian


class _Symbolic:
    def __init__(self, indptr: np.ndarray, indices: np.ndarray) -> None:
        n = indptr.size - 1
        column = np.repeat(np.arange(n, dtype=indices.dtype), np.diff(indptr))
        self._lower = np.flatnonzero(indices >= column)
        counts = np.bincount(column[self._lower], minlength=n)
        lower_indptr = np.concatenate(([0], np.cumsum(counts)))
        ones = np.ones(self._lower.size)
        pattern = scipy.sparse.csc_array((ones, indices[self._lower], lower_indptr), shape=(n, n))
        self._symbolic = rslab.analyze(pattern, path="ldlt", ordering="amf")

    @functools.cached_property
    def work(self) -> tuple[float, float]:
        """Entries of the factor, and the flops that making it takes."""
        pivots, order = np.asarray(self._symbolic.front_dims, dtype=float).reshape(-1, 2).T
        flops = pivots * (order**2 - order * pivots + pivots**2 / 3)
        return float(self._symbolic.factor_nnz), float(flops.sum())

    def factor(self, data: np.ndarray) -> _Factor:
        """Factor values on the pattern."""
        try:
            return _Factor(self._symbolic.factor(data[self._lower], threads=_threads()))
        except RuntimeError as error:  # a pivot is numerically zero
            raise NotPositive(str(error)) from None


class _Factor:
    def __init__(self, factor) -> None:
        self._factor = factor
        self.nbytes = int(factor.heap_bytes)

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve for a block of columns."""
        if rhs.shape[1] == 1:
            return self._factor.solve(np.ascontiguousarray(rhs[:, 0]))[:, None]
        return self._factor.solve_many(np.ascontiguousarray(rhs))

    def positive(self) -> bool:
        """Whether the inertia is (n, 0, 0)."""
        return self._factor.inertia[0] == self._factor.n


def _threads() -> int:
    return min(4, torch.get_num_threads())


def analyze(indptr: np.ndarray, indices: np.ndarray) -> _Symbolic:
    """Order the pattern and lay out its supernodes."""
    return _Symbolic(indptr, indices)
