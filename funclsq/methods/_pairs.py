"""N = B^H B by the pairs of entries of B that meet in it: listed once per pattern, summed often.

    N[i, j] = sum over the pairs (p, q) of entries in one row, columns i >= j, of conj(v[p]) v[q]

For one matrix the pairs stay in the order of the rows of B, and each product is added to its sum.
For a batch they lie in layers: the first product of every sum, the second of those that have two,
and so on, sums with many products first, so that each layer is added to the leading sums of all
members in one go (twice as fast as segmented sums, which are left for what few sums have). Where N
is written out in full, each product is added to its place in it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy  # its subpackages load on first use

from funclsq.pattern import SparsityPattern

__all__ = ["Pairs", "add_up", "in_rows"]

_CACHED = 100_000  # pairs x members multiplied at a time, which stay in the cache
_LAYERS = 64  # products of one sum that lie in layers


class Pairs:
    """The pairs of a pattern, and which entries of N their sums are.

    Parameters
    ----------
    pattern : SparsityPattern, (m, n)
        That of B.
    rows, indices : array
        Rows and columns of the entries of N, both triangles, sorted by rows.
    by_sums : bool
        Sort the pairs for :meth:`many` (else they are for :meth:`one`).
    diagonal : bool
        Whether sums on the diagonal of N are wanted, too.

    Attributes
    ----------
    lower, upper : array
        Entry of N that each sum is, and the one that its conjugate is.
    """

    def __init__(
        self,
        pattern: SparsityPattern,
        rows: np.ndarray,
        indices: np.ndarray,
        by_sums: bool,
        diagonal: bool = True,
    ) -> None:
        n = pattern.shape[1]
        p, q = in_rows(pattern.indptr, diagonal)
        i, j = pattern.indices[p], pattern.indices[q]  # i >= j: columns rise within a row
        order = _sort_by(i, j, n)
        i, j = i[order], j[order]
        new = np.ones(i.size, dtype=bool)
        new[1:] = (i[1:] != i[:-1]) | (j[1:] != j[:-1])
        starts = np.flatnonzero(new)
        if by_sums:
            layered, starts, self._layers, self._tails = _in_layers(starts, i.size)
            order = order[layered]
            p, q = p[order], q[order]
        else:
            self._sum = np.empty(i.size, dtype=np.intp)
            self._sum[order] = np.cumsum(new) - 1
        self._first, self._second = p, q
        key = rows.astype(np.int64) * n + indices
        i, j = i[starts].astype(np.int64), j[starts].astype(np.int64)
        self.lower, self.upper = np.searchsorted(key, i * n + j), np.searchsorted(key, j * n + i)

    def one(self, v: np.ndarray) -> np.ndarray:
        """Sums from the CSR values of one B."""
        out = np.zeros(self.lower.size, dtype=v.dtype)
        add_up(out, self._sum, v, self._first, self._second)
        return out

    def many(self, v: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Sums of a batch, some members at a time: which, and (members, sums).

        Members run along the fast axis, in blocks that stay in the cache.
        """
        step = max(1, _CACHED // max(1, self._first.size))
        if not self._layers:
            yield slice(None), np.empty((v.shape[0], 0), dtype=v.dtype)
            return
        for at in range(0, v.shape[0], step):
            part = np.ascontiguousarray(v[at : at + step].T)
            sums, start = self._products(part, 0, self._layers[0]), self._layers[0]
            for count in self._layers[1:]:
                sums[:count] += self._products(part, start, start + count)
                start += count
            if self._tails.size:
                rest = self._products(part, start, self._first.size)
                sums[: self._tails.size] += np.add.reduceat(rest, self._tails, axis=0)
            yield slice(at, at + step), sums.T

    def _products(self, part: np.ndarray, start: int, stop: int) -> np.ndarray:
        out = part.take(self._first[start:stop], axis=0)
        if np.iscomplexobj(out):
            np.conj(out, out=out)
        out *= part.take(self._second[start:stop], axis=0)
        return out


def _in_layers(
    starts: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """Sort segments by falling length, and lay their items in layers, those beyond by segments.

    Returns the order of the items; the starts of the segments in their new order; the number of
    items of each layer, the k-th of which belongs to the k-th segment; and where in what is left
    the rest of each of the leading segments starts.
    """
    lengths = np.diff(starts, append=size)
    by_length = np.argsort(lengths)[::-1]
    starts, lengths = starts[by_length], lengths[by_length]
    layers = [np.empty(0, dtype=starts.dtype)]
    for depth in range(min(_LAYERS, int(lengths.max(initial=0)))):
        layers.append(starts[: np.count_nonzero(lengths > depth)] + depth)
    rest = lengths[lengths > _LAYERS] - _LAYERS
    tails = np.cumsum(rest) - rest
    inside = np.arange(rest.sum()) - np.repeat(tails, rest)
    long = np.repeat(starts[: rest.size] + _LAYERS, rest) + inside
    order = np.concatenate([*layers, long])
    return order, starts, [part.size for part in layers[1:]], tails


def add_up(
    out: np.ndarray, at: np.ndarray, v: np.ndarray, first: np.ndarray, second: np.ndarray
) -> None:
    """Add conj(v[first]) v[second] to ``out[at]``."""
    for start in range(0, first.size, _CACHED):
        part = slice(start, start + _CACHED)
        products = v.take(first[part])
        if np.iscomplexobj(products):
            np.conj(products, out=products)
        products *= v.take(second[part])
        np.add.at(out, at[part], products)


def in_rows(indptr: np.ndarray, diagonal: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """All (p, q) with p >= q in the same row (p > q without ``diagonal``), by length of rows."""
    counts = np.diff(indptr)
    left, right = [], []
    for length in np.unique(counts):
        i, j = np.tril_indices(length, 0 if diagonal else -1)
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
