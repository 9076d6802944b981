"""One column through the rows of a sparse matrix, by loops that numba compiles where it is there.

A row that was read for the product with A is in the cache still, and serves the one with A^H at
once: what a step of a Krylov method or of a refinement needs of the matrix is one pass over it,
norms included, and no copy of A^H is made. On one thread, against the products of torch (MKL's)
and its vector operations, such a step takes 0.3 to 0.8 of the time, a product alone 0.25 to 0.9
(eleven patterns, 65,000 to 4,000,000 entries).

Threads share the rows; each adds up a column of its own where A^H is applied.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from funclsq import compiled, spare

__all__ = ["LEAST", "DampedRows", "Rows", "flat", "rows_of", "scaled_entries", "squared_lengths"]

Array: TypeAlias = np.ndarray

LEAST = 1 << 13  # entries below which loading numba, half a second, is not worth it
_SPARE_COLUMNS = 2  # of the entries of a thread, what its own column of A^H may take


def rows_of(indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Rows | None:
    """Return the passes over a CSR matrix; None where torch is to do it."""
    loops = _loops_for(values)
    return None if loops is None else Rows(loops, indptr, indices, values, shape)


class Rows:
    """Passes over the rows of a CSR matrix A (m, n); columns are arrays of one dimension."""

    def __init__(
        self, loops: Any, indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]
    ) -> None:
        self.loops, self.shape = loops, shape
        self._indptr = compiled.unsigned(indptr)
        values = values.detach().resolve_conj().resolve_neg().contiguous()
        self._csr = self._indptr, compiled.unsigned(indices), values.numpy()
        self._size = values.shape[0]
        self._own = self._size // (_SPARE_COLUMNS * max(shape[1], 1))  # threads at most

    def apply(self, x: Array, y: Array) -> float:
        """y = A x; returns ||y||^2."""
        loop = self.loops.apply
        ranges = compiled.parts(self._indptr, self._size)
        if len(ranges) == 1:
            return loop(*self._csr, x, y, *ranges[0])
        squares = compiled.shared(lambda _, *rows: loop(*self._csr, x, y, *rows), ranges)
        return sum(squares)

    def adjoint(self, y: Array, x: Array) -> None:
        """x += A^H y."""
        self._added(self.loops.adjoint, (y,), x)

    def through(self, x: Array, scale: float, u: Array, p: Array) -> float:
        """u <- A x - scale u (anything where scale is 0) and p += A^H u; returns ||u||^2."""
        return self._added(self.loops.through, (x, scale, u), p)

    def descend(self, alpha: float, q: Array, r: Array, s: Array) -> float:
        """r <- r - alpha q and s += A^H r; returns ||r||^2."""
        return self._added(self.loops.descend, (alpha, q, r), s)

    def _added(self, loop: Any, arguments: tuple[Any, ...], x: Array) -> float:
        """Run a loop that adds to x: each further thread to a column of its own."""
        ranges = compiled.parts(self._indptr, self._size, self._own)
        if len(ranges) == 1:
            return loop(*self._csr, *arguments, x, *ranges[0])
        own = spare.empty((len(ranges) - 1, x.size), torch.from_numpy(x).dtype).zero_().numpy()
        squares = compiled.shared(
            lambda number, *rows: loop(
                *self._csr, *arguments, own[number - 1] if number else x, *rows
            ),
            ranges,
        )
        x += own.sum(0)
        return sum(square or 0.0 for square in squares)


class DampedRows:
    """The same passes over [A; diag(damp)]."""

    def __init__(self, rows: Rows, damp: Tensor) -> None:
        self._rows, (self._m, n) = rows, rows.shape
        self.loops, self.shape = rows.loops, (self._m + n, n)
        self._damp = damp.detach().contiguous().numpy()

    def apply(self, x: Array, y: Array) -> float:
        """See Rows."""
        m = self._m
        return self._rows.apply(x, y[:m]) + self.loops.apply_diagonal(self._damp, x, y[m:])

    def adjoint(self, y: Array, x: Array) -> None:
        """See Rows."""
        x += self._damp * y[self._m :]
        self._rows.adjoint(y[: self._m], x)

    def through(self, x: Array, scale: float, u: Array, p: Array) -> float:
        """See Rows."""
        m = self._m
        square = self.loops.through_diagonal(self._damp, x, scale, u[m:], p)
        return square + self._rows.through(x, scale, u[:m], p)

    def descend(self, alpha: float, q: Array, r: Array, s: Array) -> float:
        """See Rows."""
        m = self._m
        square = self.loops.descend_diagonal(self._damp, alpha, q[m:], r[m:], s)
        return square + self._rows.descend(alpha, q[:m], r[:m], s)


def squared_lengths(indices: Tensor, values: Tensor, n: int) -> Tensor | None:
    """Sums of |values|^2 by column, (..., n) for (..., nnz); None where torch is to do it."""
    loops = _loops_for(values)
    if loops is None:
        return None
    out = torch.zeros((*values.shape[:-1], n), dtype=values.real.dtype)
    loops.lengths(compiled.unsigned(indices), _members(values), _members(out))
    return out


def scaled_entries(indices: Tensor, values: Tensor, factors: Tensor) -> Tensor | None:
    """values[..., e] factors[..., indices[e]], by members; None where torch is to do it."""
    loops = _loops_for(values)
    if loops is None or factors.dtype != values.real.dtype:
        return None
    shape = values.shape if values.ndim >= factors.ndim else (*factors.shape[:-1], values.shape[-1])
    out = spare.empty(shape, values.dtype)
    loops.scaled(compiled.unsigned(indices), _members(values), _members(factors), _members(out))
    return out


def _loops_for(values: Tensor) -> Any:
    plain = values.device.type == "cpu" and not values.requires_grad
    return compiled.loops() if plain and values.numel() >= max(LEAST, 1) else None


def _members(t: Tensor) -> np.ndarray:
    """An array of two dimensions; no copy of what lies in one piece."""
    array = t.detach().resolve_conj().resolve_neg().numpy()
    return np.ascontiguousarray(array).reshape(-1, array.shape[-1])


def flat(t: Tensor) -> Array:
    """A column as an array of one dimension; no copy of what lies in one piece."""
    return t.detach().numpy().reshape(-1)
