"""The normal matrix N = B^H B of a sparse B: its structure once per pattern, its values often.

The structure is kept with the pattern. The values of one matrix come from SciPy's sparse product,
whose rows are unsorted but always in the same order, so that a kept permutation sorts them. The
values of a batch come from a list of the pairs of entries that meet in each entry of N, one
gather, one product and one segmented sum for all members:

    N[e] = sum over the pairs (p, q) of e of conj(v[p]) v[q]

(For one matrix the list was measured 1.0 to 2.2 times slower than the product: its reads scatter.)

Where N is written out in full, the pairs need no order, and each product is added to its place: 1.5
to 4 times faster than SciPy's product, half of which is above the diagonal.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq import spare
from funclsq.methods._dense_rows import sparse_part
from funclsq.pattern import SparsityPattern

__all__ = ["Gram", "estimate", "full_square", "gram_of", "predict", "square"]

MAX_PAIRS = 10_000_000  # longer lists are not kept (80 MB): members are multiplied one by one
_MAX_PLACES = 4_000_000  # (48 MB) of an N that is written out
_CACHED = 100_000  # pairs x members multiplied at a time
_SAMPLE = 128  # columns of N counted by predict


class _Pairs(NamedTuple):
    """Which values of B meet in N; ``place[e]`` numbers the sum that entry e of N takes."""

    first: np.ndarray
    second: np.ndarray
    starts: np.ndarray
    place: np.ndarray


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
        self._plan: _Pairs | None = None

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
        if self.pairs > MAX_PAIRS:
            return np.stack([self._product(member) for member in v])
        return self._planned(v, self._pairs().place)

    def dense(self, v: np.ndarray) -> np.ndarray:
        """N as a full array, (..., n, n)."""
        n = self.n
        at = self.rows.astype(np.int64) * n + self.indices
        if v.ndim == 2 and self.pairs <= MAX_PAIRS:
            place = np.full(n * n, -1)
            place[at] = self._pairs().place
            return self._planned(v, place).reshape(len(v), n, n)
        out = np.zeros((*v.shape[:-1], n * n), dtype=v.dtype)
        out[..., at] = self.values(v)
        return out.reshape(*v.shape[:-1], n, n)

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

    def _planned(self, v: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Multiply and sum the pairs of all members; put sum ``place[e]`` at e, 0 where it is -1.

        Members run along the fast axis, in blocks that stay in the cache.
        """
        first, second, starts, _ = self._pairs()
        out = np.zeros((v.shape[0], place.size), dtype=v.dtype)
        if starts.size == 0:
            return out
        step = max(1, _CACHED // first.size)
        for at in range(0, v.shape[0], step):
            part = np.ascontiguousarray(v[at : at + step].T)
            products = part.take(second, axis=0)
            left = part.take(first, axis=0)
            products *= left.conj() if np.iscomplexobj(v) else left
            half = np.add.reduceat(products, starts, axis=0)
            whole = np.concatenate((half, half.conj(), np.zeros_like(half[:1])))
            out[at : at + step] = whole[place].T
        return out

    def _pairs(self) -> _Pairs:
        with self.pattern.lock:
            if self._plan is None:
                self._plan = self._make_pairs()
            return self._plan

    def _make_pairs(self) -> _Pairs:
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
        place = np.full(self.nnz, -1)  # sums of the upper triangle are those below, conjugated
        place[np.searchsorted(key, j * self.n + i)] = np.arange(i.size) + i.size
        place[np.searchsorted(key, i * self.n + j)] = np.arange(i.size)
        return _Pairs(p, q, starts, place)


def gram_of(pattern: SparsityPattern) -> Gram:
    """Return the structure of N = B^H B, made once per pattern."""
    with pattern.lock:
        found = pattern.cache.get("gram")
        if found is None:
            found = pattern.cache["gram"] = Gram(pattern)
    return found


def predict(pattern: SparsityPattern) -> tuple[int, float]:
    """Estimate (nnz, density) of the smaller of A^H A and A A^H without forming it."""
    return estimate(pattern if pattern.shape[0] >= pattern.shape[1] else pattern.T)


def estimate(pattern: SparsityPattern) -> tuple[int, float]:
    """Estimate (nnz, density) of A^H A without its dense rows and without forming it.

    Exact where it is known already or A has few columns; otherwise columns drawn at random are
    counted, at 128/n of the cost of the product.
    """
    pattern = sparse_part(pattern)
    n = max(1, pattern.shape[1])
    with pattern.lock:
        known = pattern.cache.get("gram")
        if known is not None:
            return known.nnz, known.nnz / n**2
        found = pattern.cache.get("gram_estimate")
        if found is None:
            ones = np.ones(pattern.nnz_unique)
            sample = np.arange(pattern.shape[1])
            if n > _SAMPLE:
                sample = np.sort(np.random.default_rng(0).choice(n, _SAMPLE, replace=False))
            part = _adjoint(pattern, ones)[sample] @ _csr(pattern, ones)
            nnz = int(part.nnz * (n / max(1, sample.size)))
            found = pattern.cache["gram_estimate"] = (nnz, nnz / n**2)
    return found


def full_square(pattern: SparsityPattern, v: np.ndarray) -> Tensor:
    """B^H B written out, (n, n), stored by columns; its lower triangle holds it."""
    n = pattern.shape[1]
    N = spare.empty((n, n), torch.from_numpy(v).dtype)
    places = _places(pattern)
    if places is None:  # all of it, and by rows: the conjugate by columns
        square(pattern, v).toarray(out=N.numpy())
        return N.mH.resolve_conj()
    left, right, at = places
    products = v.take(left)
    if np.iscomplexobj(products):
        np.conj(products, out=products)
    products *= v.take(right)
    np.add.at(N.zero_().numpy().reshape(-1), at, products)
    return N.mT


def _places(pattern: SparsityPattern) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """For all (p, q) in one row, columns i >= j: p, q and the place of (i, j) by columns; kept."""
    n, counts = pattern.shape[1], np.diff(pattern.indptr).astype(np.int64)
    pairs = int((counts * (counts + 1) // 2).sum())
    if pairs > min(_MAX_PLACES, 2 * n**2) or n**2 > np.iinfo(np.int32).max:
        return None  # where many pairs meet in each entry, SciPy's product does as well
    with pattern.lock:
        found = pattern.cache.get("gram_places")
        if found is None:
            p, q = _pairs_in_rows(pattern.indptr)
            i, j = pattern.indices[p].astype(np.int32), pattern.indices[q].astype(np.int32)
            found = pattern.cache["gram_places"] = (p, q, j * np.int32(n) + i)
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
    by_j = (
        scipy.sparse.csr_array(
            (np.arange(size, dtype=np.int32), j, np.arange(size + 1)), shape=(size, n)
        )
        .tocsc()
        .data
    )
    moved = i[by_j]
    by_i = (
        scipy.sparse.csr_array(
            (np.arange(size, dtype=np.int32), moved, np.arange(size + 1)), shape=(size, n)
        )
        .tocsc()
        .data
    )
    return by_j[by_i]
