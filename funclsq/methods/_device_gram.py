"""The normal matrix N = B^H B of a sparse B whose values lie on a device.

As in _pairs, N is a sum over the pairs of entries that meet in a row of B; the lists of pairs move
to the device once per pattern, and there each product is added to its place: in N written out, or
in the upper triangle of a sparse N. On CUDA the order of additions into one place is not fixed
unless ``torch.use_deterministic_algorithms(True)`` is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.backends import cudss_analysis
from funclsq.methods._gram import gram_of
from funclsq.methods._pairs import in_rows
from funclsq.pattern import SparsityPattern

__all__ = ["Full", "Upper", "sums_of"]

_ANALYSES = 4  # kept per pattern
_AT_ONCE = 1 << 24  # products, of all members, that are made at a time


class _Sums:
    """Products of pairs of entries, each added to its place among ``size`` sums."""

    def __init__(self, pattern: SparsityPattern, device: torch.device) -> None:
        p, q = in_rows(pattern.indptr)
        # columns rise within a row: the first of a pair is the row of N in its lower triangle
        i, j = (pattern.indices[side].astype(np.int64) for side in (p, q))
        self.n = pattern.shape[1]
        self.size, at = self._places(pattern, i, j)
        self._lists = tuple(torch.from_numpy(part).to(device) for part in (p, q, at))

    def _places(self, pattern: SparsityPattern, i: np.ndarray, j: np.ndarray):
        raise NotImplementedError

    def values(self, v: Tensor) -> Tensor:
        """Sums of conj(v[p]) v[q], (..., size), from the CSR values of B, (..., nnz)."""
        out = v.new_zeros((*v.shape[:-1], self.size))
        step = max(1, _AT_ONCE // max(1, v.shape[0] if v.ndim > 1 else 1))
        for p, q, at in zip(*(part.split(step) for part in self._lists)):
            products = v.index_select(-1, p)
            if v.is_complex():
                products = products.conj().resolve_conj()
            out.index_add_(-1, at, products.mul_(v.index_select(-1, q)))
        return out


class Full(_Sums):
    """N written out, stored by columns; its lower triangle holds it."""

    def _places(self, pattern, i, j):
        return self.n**2, j * self.n + i

    def matrix(self, v: Tensor) -> Tensor:
        """N, (n, n) or (b, n, n)."""
        return self.values(v).view(*v.shape[:-1], self.n, self.n).mT


class Upper(_Sums):
    """The upper triangle of a sparse N as CSR, with its whole diagonal.

    Attributes
    ----------
    indptr, indices : int32 array
        Its structure.
    diagonal : Tensor
        Position of each diagonal entry among the values, on the device.
    """

    def __init__(self, pattern: SparsityPattern, device: torch.device) -> None:
        super().__init__(pattern, device)
        self._lock = pattern.lock
        self._analyses: dict[Any, Any] = {}
        self.diagonal = torch.from_numpy(self.indptr[:-1].astype(np.int64)).to(device)

    def _places(self, pattern, i, j):
        gram = gram_of(pattern)
        upper = np.flatnonzero(gram.indices >= gram.rows)
        rows, self.indices = gram.rows[upper].astype(np.int64), gram.indices[upper]
        counts = np.bincount(rows, minlength=self.n)
        self.indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        return upper.size, np.searchsorted(rows * self.n + self.indices, j * self.n + i)

    def triangle(self, v: Tensor, diagonal: Tensor) -> Tensor:
        """Values, (..., size), of N + diag(diagonal): those below, conjugated."""
        out = self.values(v)
        out = out.conj().resolve_conj() if out.is_complex() else out
        return out.index_add_(-1, self.diagonal, diagonal.expand(*out.shape[:-1], self.n))

    def factored(self, values: Tensor, shift: float):
        """Factor N + shift I, or a batch of them."""
        if shift:
            more = values.new_full((self.n,), shift).expand(*values.shape[:-1], self.n)
            values = values.index_add(-1, self.diagonal, more)
        batch = values.shape[0] if values.ndim > 1 else None
        key = (batch, values.dtype)
        with self._lock:
            found = self._analyses.pop(key, None)
            if found is None:
                where = (self.indptr, self.indices, batch, values.dtype, values.device)
                found = cudss_analysis(*where)
                for old in list(self._analyses)[: max(0, len(self._analyses) - _ANALYSES + 1)]:
                    del self._analyses[old]
            self._analyses[key] = found
        return found.factor(values)


def sums_of(kind: type, pattern: SparsityPattern, device: torch.device):
    """Return the lists of a pattern on a device, made once."""
    key = (kind.__name__, device)
    with pattern.lock:
        found = pattern.cache.get(key)
        if found is None:
            found = pattern.cache[key] = kind(pattern, device)
    return found
