"""The normal matrix N = B^H B of a sparse B: its structure once per pattern, its values often.

The structure is kept with the pattern. The values of a batch are sums of pairs (see _pairs), and
those of one matrix where the sums stay in the cache: 1.3 to 3 times faster there than SciPy's
sparse product, half of which is above the diagonal. Where they do not, up to 2 times slower: then
it is that product, whose rows are unsorted but always in the same order, so that a kept permutation
sorts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq import spare
from funclsq.methods._dense_rows import sparse_part
from funclsq.methods._pairs import Pairs, add_up, in_rows
from funclsq.pattern import SparsityPattern

__all__ = ["Gram", "estimate", "full_square", "gram_of", "predict", "square"]

MAX_PAIRS = 10_000_000  # longer lists are not kept (80 MB): members are multiplied one by one
_MAX_ADDED = 1_000_000  # (16 to 24 MB) of one matrix, added up one by one
_MAX_SUMS = 250_000  # entries of N whose sums stay in the cache
_MAX_PLACES = 4_000_000  # (48 MB) of an N that is written out
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
        self._lists: dict[tuple[bool, bool], Pairs] = {}

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
            if self.pairs > _MAX_ADDED or self.nnz > _MAX_SUMS:
                return self._product(v)
            listed = self._listed(by_sums=False)
            blocks: Iterable[tuple[Any, np.ndarray]] = [(..., listed.one(v))]
        elif self.pairs > MAX_PAIRS:
            return np.stack([self._product(member) for member in v])
        else:
            listed = self._listed(by_sums=True)
            blocks = listed.many(v)
        out = spare.empty((*v.shape[:-1], self.nnz), torch.from_numpy(v).dtype).zero_().numpy()
        for members, sums in blocks:
            out[members, listed.upper] = sums.conj() if np.iscomplexobj(sums) else sums
            out[members, listed.lower] = sums
        return out

    def written_out(self, v: np.ndarray) -> Tensor:
        """N of a batch as (b, n, n), stored by columns; their lower triangles hold it.

        Without its diagonal, the squares of the lengths of columns, which are known as a rule (a
        third of the products with five entries in a row).
        """
        n = self.n
        out = spare.empty((v.shape[0], n * n), torch.from_numpy(v).dtype)
        place = self.indices * np.int64(n) + self.rows
        if self.pairs <= MAX_PAIRS:
            listed = self._listed(by_sums=True, diagonal=False)
            source = np.full(n * n, listed.lower.size)  # a zero after the sums, where none belongs
            source[place[listed.lower]] = np.arange(listed.lower.size)
            for members, sums in listed.many(v):
                part = np.zeros((sums.shape[0], sums.shape[1] + 1), dtype=sums.dtype)
                part[:, :-1] = sums
                np.take(part, source, -1, out.numpy()[members], mode="clip")
        else:
            lower = np.flatnonzero(self.rows > self.indices)
            out.zero_().numpy()[:, place[lower]] = self.values(v)[:, lower]
        return out.view(v.shape[0], n, n).mT

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

    def _listed(self, by_sums: bool, diagonal: bool = True) -> Pairs:
        key = (by_sums, diagonal)
        with self.pattern.lock:
            found = self._lists.get(key)
            if found is None:
                found = self._lists[key] = Pairs(self.pattern, self.rows, self.indices, *key)
            return found


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
    add_up(N.zero_().numpy().reshape(-1), at, v, left, right)
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
            p, q = in_rows(pattern.indptr)
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
