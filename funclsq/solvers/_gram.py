"""The normal matrix N = B^H B of a sparse B: its structure once per pattern, its values often.

The structure is kept with the pattern. The values of one matrix come from SciPy's sparse product,
whose rows are unsorted but always in the same order, so that a kept permutation sorts them. The
values of a batch come from a list of the pairs of entries that meet in each entry of N, one
gather, one product and one segmented sum for all members:

    N[e] = sum over the pairs (p, q) of e of conj(v[p]) v[q]

(For one matrix the list was measured 1.0 to 2.2 times slower than the product: its reads scatter.)
"""

from __future__ import annotations

import numpy as np
import scipy.sparse

from funclsq.pattern import SparsityPattern

__all__ = ["Gram", "gram_of", "predict", "square"]

MAX_PAIRS = 10_000_000  # longer lists are not kept (80 MB): members are multiplied one by one
_CHUNK = 4_000_000  # pairs x members multiplied at a time
_SAMPLE = 128  # columns of N counted by predict


class Gram:
    """Structure of N = B^H B for one pattern of B, with its whole diagonal.

    Attributes
    ----------
    indptr, indices : int32 array
        Sorted CSC (equally CSR) structure of both triangles.
    diagonal : array, shape (n,)
        Position of each diagonal entry among the values.
    pairs : int
        Products that one half of N takes.
    """

    def __init__(self, pattern: SparsityPattern) -> None:
        self.pattern = pattern
        n = pattern.shape[1]
        N = square(pattern, np.ones(pattern.nnz_unique))
        N.data = np.arange(1.0, N.nnz + 1)
        unsorted = N.nnz
        empty = np.diff(N.indptr) == 0
        if empty.any():  # columns without entries: their diagonal is stored all the same
            N = N + scipy.sparse.diags_array(np.where(empty, -1.0, 0.0), format="csr")
        N.sort_indices()
        index = np.int32 if N.nnz < np.iinfo(np.int32).max else np.int64
        self.indptr, self.indices = N.indptr.astype(index), N.indices.astype(index)
        present = N.data > 0
        self._source = N.data[present].astype(np.intp) - 1
        self._holes = None if N.nnz == unsorted else np.flatnonzero(present)
        self.rows = np.repeat(np.arange(n, dtype=index), np.diff(self.indptr))
        self.diagonal = np.flatnonzero(self.rows == self.indices)
        counts = np.diff(pattern.indptr).astype(np.int64)
        self.pairs = int((counts * (counts + 1) // 2).sum())
        self._plan: tuple[np.ndarray, ...] | None = None

    @property
    def n(self) -> int:
        """Order of N."""
        return self.pattern.shape[1]

    @property
    def nnz(self) -> int:
        """Stored entries of N, both triangles."""
        return self.indices.size

    def values(self, v: np.ndarray) -> np.ndarray:
        """Values of N, (..., nnz), from the CSR values of B, (..., nnz of B)."""
        if v.ndim == 1:
            return self._product(v)
        with self.pattern.lock:
            if self._plan is None and self.pairs <= MAX_PAIRS:
                self._plan = self._make_plan()
        if self._plan is not None:
            return self._planned(v)
        return np.stack([self._product(member) for member in v])

    def _product(self, v: np.ndarray) -> np.ndarray:
        N = square(self.pattern, v)
        if N.nnz == self._source.size:
            out = N.data[self._source]
        else:  # SciPy leaves out entries that cancel to zero
            N.sort_indices()
            n = np.int64(self.n)
            key = np.repeat(np.arange(self.n), np.diff(N.indptr)) * n + N.indices
            out = np.zeros(self.nnz, dtype=v.dtype)
            out[np.searchsorted(self.rows * n + self.indices, key)] = N.data
            return out
        if self._holes is None:
            return out
        full = np.zeros(self.nnz, dtype=v.dtype)
        full[self._holes] = out
        return full

    def _planned(self, v: np.ndarray) -> np.ndarray:
        first, second, starts, entry, mirror = self._plan  # type: ignore[misc]
        out = np.zeros((*v.shape[:-1], self.nnz), dtype=v.dtype)
        if entry.size == 0:
            return out
        rows = out.reshape(-1, self.nnz)
        members = v.reshape(-1, v.shape[-1])
        step = max(1, _CHUNK // first.size)
        for at in range(0, members.shape[0], step):
            part = members[at : at + step]
            product = part.take(second, axis=-1)
            left = part.take(first, axis=-1)
            product *= left.conj() if np.iscomplexobj(v) else left
            half = np.add.reduceat(product, starts, axis=-1)
            block = rows[at : at + step]
            block[:, entry] = half
            block[:, mirror] = half.conj() if np.iscomplexobj(v) else half
        return out

    def _make_plan(self) -> tuple[np.ndarray, ...]:
        """Pairs (p, q) of entries in one row with column p >= column q, sorted by N's entry."""
        p, q = _pairs_in_rows(self.pattern.indptr)
        indices = self.pattern.indices
        i, j = indices[p], indices[q]  # i >= j: columns rise within a row
        order = _sort_by(i, j, self.n)
        p, q, i, j = p[order], q[order], i[order], j[order]
        new = np.ones(p.size, dtype=bool)
        new[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
        starts = np.flatnonzero(new)
        key = self.rows.astype(np.int64) * self.n + self.indices
        i, j = i[starts].astype(np.int64), j[starts].astype(np.int64)
        entry = np.searchsorted(key, i * self.n + j)
        mirror = np.searchsorted(key, j * self.n + i)
        return p, q, starts, entry, mirror


def gram_of(pattern: SparsityPattern) -> Gram:
    """Return the structure of N = B^H B, made once per pattern."""
    with pattern.lock:
        found = pattern.cache.get("gram")
        if found is None:
            found = pattern.cache["gram"] = Gram(pattern)
    return found


def predict(pattern: SparsityPattern) -> tuple[int, float]:
    """Estimate (nnz, density) of the smaller of A^H A and A A^H without forming it.

    Exact where it is known already; otherwise columns drawn at random are counted, at the cost
    of a 1/(n/128) part of the product.
    """
    m, n = pattern.shape
    if m < n:
        return predict(pattern.T)
    with pattern.lock:
        known = pattern.cache.get("gram")
        if known is not None:
            return known.nnz, known.nnz / max(1, n) ** 2
        found = pattern.cache.get("gram_estimate")
        if found is None:
            B = _csr(pattern, np.ones(pattern.nnz_unique))
            sample = np.arange(n)
            if n > _SAMPLE:
                sample = np.random.default_rng(0).choice(n, _SAMPLE, replace=False)
            T = _adjoint(pattern, B.data)[np.sort(sample)]
            nnz = int((T @ B).nnz * (n / max(1, sample.size)))
            found = pattern.cache["gram_estimate"] = (nnz, nnz / max(1, n) ** 2)
    return found


def square(pattern: SparsityPattern, v: np.ndarray) -> scipy.sparse.csr_array:
    """B^H B as SciPy makes it, rows unsorted, entries that cancel left out."""
    return _adjoint(pattern, v) @ _csr(pattern, v)


def _csr(pattern: SparsityPattern, v: np.ndarray) -> scipy.sparse.csr_array:
    out = scipy.sparse.csr_array((v, pattern.indices, pattern.indptr), shape=pattern.shape)
    out.has_canonical_format = True
    return out


def _adjoint(pattern: SparsityPattern, v: np.ndarray) -> scipy.sparse.csr_array:
    values = v[pattern.t_perm]
    return scipy.sparse.csr_array(
        (values.conj(), pattern.t_indices, pattern.t_indptr), shape=pattern.shape[::-1]
    )


def _pairs_in_rows(indptr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (p, q) with p >= q in the same row, rows of one length at a time."""
    counts = np.diff(indptr)
    left, right = [], []
    for length in np.unique(counts):
        i, j = np.tril_indices(length)
        starts = indptr[:-1][counts == length][:, None]
        left.append((starts + i.astype(indptr.dtype)).reshape(-1))
        right.append((starts + j.astype(indptr.dtype)).reshape(-1))
    if not left:
        return np.empty(0, indptr.dtype), np.empty(0, indptr.dtype)
    return np.concatenate(left), np.concatenate(right)


def _sort_by(i: np.ndarray, j: np.ndarray, n: int) -> np.ndarray:
    """Order that sorts pairs by (i, j), in linear time: two counting sorts."""
    size = i.size
    by_j = scipy.sparse.csr_array(
        (np.arange(size, dtype=np.int32), j, np.arange(size + 1)), shape=(size, n)
    ).tocsc().data
    moved = i[by_j]
    by_i = scipy.sparse.csr_array(
        (np.arange(size, dtype=np.int32), moved, np.arange(size + 1)), shape=(size, n)
    ).tocsc().data
    return by_j[by_i]
