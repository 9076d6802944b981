"""rslab: a supernodal L D L^T in Rust, with the analysis kept per pattern.

Its default ordering races several, which takes 2 to 6 times as long as one of them. Minimum fill
alone is as quick to find as minimum degree, and its factor takes 0.43 to 1.17 times the flops: less
than 0.9 on eleven of 27 problems (grids, regression, linear programmes), more than 1.05 on two.

Three of its settings are changed, for 0.67 to 0.97 of the time of a factorisation and 0.68 to 0.97
of that of a solve (eleven problems, one thread; the same factor but for rounding). The matrix is
not scaled, since its diagonal is about one as it comes. Updates from 500 flops on, not 4096, go by
its kernel for products. Solves by one thread take the tree of supernodes in one piece, not in 128.
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

_SETTINGS = {"scaling": "identity", "scalar_gate": 500}
_IN_ONE_PIECE = {"solve_leaf_subtrees": 1}
_SHARED = 1 << 20  # entries times columns, up to four, from which on it shares a solve by threads


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
    def _fronts(self) -> np.ndarray:
        """Pivots of each supernode, and rows."""
        return np.asarray(self._symbolic.front_dims, dtype=float).reshape(-1, 2).T

    @functools.cached_property
    def work(self) -> tuple[float, float]:
        """Entries of the factor, and the flops that making it takes."""
        pivots, order = self._fronts
        flops = pivots * (order**2 - order * pivots + pivots**2 / 3)
        return float(self._symbolic.factor_nnz), float(flops.sum())

    @functools.cached_property
    def _small(self) -> bool:
        """Whether no solve takes more than one thread."""
        return 4 * float(np.prod(self._fronts, axis=0).sum()) < _SHARED

    def factor(self, data: np.ndarray) -> _Factor:
        """Factor values on the pattern."""
        threads = _threads()
        settings = _SETTINGS | _IN_ONE_PIECE if threads == 1 or self._small else _SETTINGS
        try:
            return _Factor(
                self._symbolic.factor(data[self._lower], threads=threads, **_known(settings))
            )
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


def _known(settings: dict[str, object]) -> dict[str, object]:
    """Those that this version has."""
    return {name: value for name, value in settings.items() if name in _every_setting()}


@functools.cache
def _every_setting() -> frozenset[str]:
    return frozenset(rslab.Settings().to_dict())


def analyze(indptr: np.ndarray, indices: np.ndarray) -> _Symbolic:
    """Order the pattern and lay out its supernodes."""
    return _Symbolic(indptr, indices)
