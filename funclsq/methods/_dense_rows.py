"""A few rows with many entries, kept out of the normal matrix that they would fill.

With the rows of A parted into a sparse part S and few dense ones E, r of them,

    N = A^H A = N_S + E^H E,   N_S = S^H S,
    N^-1 q = y - Y (I + E Y)^-1 E y,   y = N_S^-1 q,   Y = N_S^-1 E^H,

(Sherman, Morrison and Woodbury), so that only N_S is factored, and r more solves with its factor
serve every right-hand side. Where S alone is near-singular the formula loses digits; the caller
refines on the true residual.

References
----------
J. Scott and M. Tuma, Sparse stretching for solving sparse-dense linear least-squares problems,
SIAM J. Sci. Comput. 41 (2019) A1604-A1625, doi:10.1137/18M1181353 (and what it surveys).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from funclsq.backends import NotPositive
from funclsq.pattern import SparsityPattern

__all__ = ["Border", "DenseRows", "dense_rows", "sparse_part"]

MOST = 100  # rows that are kept apart at most
_SMALL = 256  # columns up to which nothing is kept apart
_TIMES = 16  # entries of a dense row, to those of the middle one among rows with entries
_SAVED = 0.5  # of the pairs of entries that meet in A^H A, at least
_LOSS = 1e10  # largest |I + E Y| with an unshifted factor


class DenseRows:
    """Which rows of a pattern are dense, and the pattern without their entries.

    Attributes
    ----------
    pattern : SparsityPattern, (m, n)
        The sparse part, the dense rows empty.
    kept : int array
        Places of its entries among the CSR entries of the whole.
    """

    def __init__(self, whole: SparsityPattern, rows: np.ndarray) -> None:
        counts = np.diff(whole.indptr)
        entry_rows = np.repeat(np.arange(whole.shape[0]), counts)
        dense = np.zeros(whole.shape[0], dtype=bool)
        dense[rows] = True
        out = dense[entry_rows]
        self.kept = np.flatnonzero(~out)
        self._taken = torch.from_numpy(np.flatnonzero(out))
        number = np.cumsum(dense) - 1
        n = whole.shape[1]
        place = number[entry_rows[out]].astype(np.int64) * n + whole.indices[out]
        self._place, self._size = torch.from_numpy(place), (rows.size, n)
        self.pattern = SparsityPattern(entry_rows[self.kept], whole.indices[self.kept], whole.shape)

    def written_out(self, csr_values: Tensor) -> Tensor:
        """E, (..., r, n), from the CSR values of the whole."""
        E = csr_values.new_zeros((*csr_values.shape[:-1], self._size[0] * self._size[1]))
        E[..., self._place] = csr_values[..., self._taken]
        return E.unflatten(-1, self._size)


def dense_rows(pattern: SparsityPattern) -> DenseRows | None:
    """Return the dense rows of a pattern if it pays to keep them apart; found once."""
    with pattern.lock:
        if "dense_rows" not in pattern.cache:
            rows = _find(np.diff(pattern.indptr), pattern.shape[1])
            pattern.cache["dense_rows"] = DenseRows(pattern, rows) if rows.size else None
        return pattern.cache["dense_rows"]


def sparse_part(pattern: SparsityPattern) -> SparsityPattern:
    """Return the pattern whose normal matrix is factored."""
    found = dense_rows(pattern)
    return pattern if found is None else found.pattern


def _find(counts: np.ndarray, n: int) -> np.ndarray:
    filled = counts[counts > 0].astype(np.int64)
    none = np.empty(0, dtype=np.intp)
    if n <= _SMALL or filled.size < 2 * MOST:
        return none
    rows = np.flatnonzero(counts > max(_TIMES * np.median(filled), n**0.5))
    if not 0 < rows.size <= MOST:
        return none
    pairs, saved = (float((c.astype(float) ** 2).sum()) for c in (filled, counts[rows]))
    return rows if saved > _SAVED * pairs else none


class Border:
    """Corrects solves with N_S for the dense rows E, (..., r, n)."""

    def __init__(self, E: Tensor, solve: Callable[[Tensor], Tensor], shifted: bool) -> None:
        self._E, self._solve = E, solve
        self._Y = solve(E.mH.contiguous())
        C = E @ self._Y
        C = (C + C.mH) / 2 + torch.eye(E.shape[-2], dtype=E.dtype)
        self._L, fault = torch.linalg.cholesky_ex(C)
        if bool(fault.any()) or not (shifted or bool((C.abs() < _LOSS).all())):
            raise NotPositive("the matrix without its dense rows is near-singular")

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 2 * self._E.numel() * self._E.element_size()

    def solve(self, q: Tensor) -> Tensor:
        """(N_S + E^H E)^-1 q, q (..., n, k)."""
        y = self._solve(q)
        return y - self._Y @ torch.cholesky_solve(self._E @ y, self._L)
