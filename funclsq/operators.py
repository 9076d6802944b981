"""The matrix as solvers see it: products with A and A^H on plain tensors, no autograd.

A *structure* is static and hashable (a sparsity pattern, a dense shape, a pair of functions); a
structure bound to parameter tensors is an *operator*. Vectors come as blocks of columns, (n, k),
or (B, n, k) where the parameters carry a batch dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from funclsq import spare
from funclsq.entries import entries_to_csr
from funclsq.passes import DampedRows, Rows, flat, rows_of, scaled_entries, squared_lengths
from funclsq.pattern import SparsityPattern
from funclsq.products import csr_mm, csr_tensor
from funclsq.shapes import broadcast_shapes

__all__ = [
    "DenseOp",
    "DenseStructure",
    "Operator",
    "ScaledOp",
    "SparseOp",
    "SparseStructure",
    "StackedOp",
    "column_scale",
]


class Operator(Protocol):
    """A linear operator on blocks of columns."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    batch: int | None

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = A X."""
        ...

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = A^H Y."""
        ...

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> Operator:
        """Return diag(row) A diag(col)."""
        ...

    def column_norms(self) -> Tensor | None:
        """2-norms of the columns, or None where they cannot be had cheaply."""
        ...


def _batch_of(*sizes: int | None) -> int | None:
    return next((s for s in sizes if s is not None), None)


def _leading(t: Tensor | None, core: int) -> int | None:
    return None if t is None or t.ndim == core else t.shape[0]


@dataclasses.dataclass(frozen=True)
class SparseStructure:
    """Structure of a matrix given by one value per stored entry of a pattern."""

    pattern: SparsityPattern
    param_ndims = (1,)
    kind = "sparse"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.pattern.shape

    def bind(self, params: tuple[Tensor, ...]) -> SparseOp:
        """Attach values, (nnz,) or (B, nnz) in the entry order of the pattern."""
        return SparseOp(self.pattern, entries_to_csr(self.pattern, params[0]))


class SparseOp:
    """A sparse operator: one CSR of A and, from first use, one of A^H."""

    def __init__(self, pattern: SparsityPattern, csr_values: Tensor) -> None:
        self.pattern = pattern
        self.csr_values = csr_values
        self.shape = pattern.shape
        self.dtype, self.device = csr_values.dtype, csr_values.device
        self.batch = _leading(csr_values, 1)
        self._forward: Tensor | None = None
        self._adjoint: Tensor | None = None
        self._passes: Rows | None = None
        self._asked = False  # whether there are passes

    def _whole(self) -> SparsityPattern:
        return self.pattern if self.batch is None else self.pattern.repeated(self.batch)

    def matrix(self) -> Tensor:
        """CSR tensor of A (block diagonal over a batch)."""
        if self._forward is None:
            p = self._whole()
            self._forward = csr_tensor(
                p.tensor("indptr", self.device),
                p.tensor("indices", self.device),
                self.csr_values.reshape(-1),
                p.shape,
            )
        return self._forward

    def adjoint_matrix(self) -> Tensor:
        """CSR tensor of A^H (block diagonal over a batch)."""
        if self._adjoint is None:
            p = self._whole()
            order = self.pattern.tensor("t_perm", self.device)
            values = spare.taken(self.csr_values, order).reshape(-1)
            self._adjoint = csr_tensor(
                p.tensor("t_indptr", self.device),
                p.tensor("t_indices", self.device),
                values.conj().resolve_conj() if values.is_complex() else values,
                p.shape[::-1],
            )
        return self._adjoint

    def passes(self) -> Rows | None:
        """Passes of one column over the rows (block diagonal over a batch); None: use products."""
        if not self._asked:
            p = self._whole()
            names = ("indptr", "indices")
            indptr, indices = (p.tensor(name, self.device) for name in names)
            self._passes = rows_of(indptr, indices, self.csr_values.reshape(-1), p.shape)
            self._asked = True
        return self._passes

    def adjoint_passes(self) -> Rows | None:
        """The same for A^H."""
        if self.passes() is None:
            return None
        p = self._whole()
        indptr, indices = (p.tensor(name, self.device) for name in ("t_indptr", "t_indices"))
        return rows_of(indptr, indices, self.adjoint_matrix().values(), p.shape[::-1])

    def _product(self, adjoint: bool, X: Tensor, out: Tensor | None) -> Tensor:
        """A X or A^H X of a block (whole rows of a batch under each other)."""
        rows = None
        if X.shape[1] == 1 and X.dtype == self.dtype and (out is None or out.is_contiguous()):
            rows = self.passes()
        if rows is None:
            return csr_mm(self.adjoint_matrix() if adjoint else self.matrix(), X, out)
        x = flat(X.resolve_conj().resolve_neg())
        if out is None:
            out = spare.empty((rows.shape[1 if adjoint else 0], 1), self.dtype)
        if adjoint:
            rows.adjoint(x, flat(out.zero_()))
        else:
            rows.apply(x, flat(out))
        return out

    def _apply(self, adjoint: bool, X: Tensor, out: Tensor | None) -> Tensor:
        size = self.shape[1 if adjoint else 0]
        if self.batch is None:
            if X.ndim == 2:
                return self._product(adjoint, X, out)
            count, rows, k = X.shape
            folded = X.movedim(0, 1).reshape(rows, count * k)
            result = self._product(adjoint, folded, None).reshape(size, count, k).movedim(1, 0)
        else:
            X = X.expand(self.batch, *X.shape[-2:])
            k = X.shape[-1]
            if self.batch == 0 or k == 0:
                result = X.new_zeros((self.batch, size, k))
            else:
                flat = X.reshape(-1, k)
                into = None if out is None else out.view(-1, k)
                result = self._product(adjoint, flat, into).view(self.batch, size, k)
                if out is not None:
                    return out
        return result if out is None else out.copy_(result)

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = A X."""
        return self._apply(False, X, out)

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = A^H Y."""
        return self._apply(True, Y, out)

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> SparseOp:
        """Return diag(row) A diag(col)."""
        values = self.csr_values
        for factors, index in ((row, "csr_rows"), (col, "indices")):
            if factors is None:
                continue
            place = self.pattern.tensor(index, self.device)
            product = scaled_entries(place, values, factors)
            if product is None:
                each = spare.taken(factors, place)
                product = spare.product(values, each, each)
            values = product
        return SparseOp(self.pattern, values)

    def column_norms(self) -> Tensor:
        """2-norms of the columns, safe from overflow and underflow."""
        values = self.csr_values
        index = self.pattern.tensor("indices", self.device)
        out = values.real.new_zeros((*values.shape[:-1], self.shape[1]))
        if values.numel() == 0:
            return out
        if self.device.type == "cpu":
            squares = squared_lengths(index, values, self.shape[1])
            if squares is not None:
                out = squares
            elif values.is_complex():
                out.index_add_(
                    -1, index, torch.view_as_real(values.resolve_conj()).square().sum(-1)
                )
            else:
                out.index_add_(-1, index, spare.product(values, values))
            least, largest = torch.aminmax(out)
            if least == 0:  # of a column without entries: nothing was lost there
                starts = self.pattern.tensor("t_indptr", self.device)
                least = out.masked_fill(starts[1:] == starts[:-1], torch.inf).amin()
            safe = torch.finfo(out.dtype).tiny ** 0.5
            if float(least) > safe and float(largest) < 1 / safe:  # then no square was lost
                return out.sqrt_()
            out.zero_()
        size = values.abs()
        index = index.long().expand_as(size)
        top = out.scatter_reduce(-1, index, size, "amax")
        unit = torch.where(top > 0, top, torch.ones_like(top))
        part = (size / unit.gather(-1, index)) ** 2
        return top * out.scatter_add_(-1, index, part).sqrt_()

    def dense(self) -> Tensor:
        """The matrix as a strided tensor, (m, n) or (B, m, n)."""
        lead = self.csr_values.shape[:-1]
        out = self.csr_values.new_zeros((*lead, self.shape[0] * self.shape[1]))
        place = self.pattern.tensor("place", self.device)
        if lead or self.device.type != "cpu":
            out.index_copy_(-1, place, self.csr_values)
        else:
            out.numpy()[place.numpy()] = (
                self.csr_values.detach().resolve_conj().resolve_neg().numpy()
            )
        return out.view(*lead, *self.shape)


@dataclasses.dataclass(frozen=True)
class DenseStructure:
    """Structure of a strided matrix."""

    m: int
    n: int
    param_ndims = (2,)
    kind = "dense"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return (self.m, self.n)

    def bind(self, params: tuple[Tensor, ...]) -> DenseOp:
        """Attach the matrix, (m, n) or (B, m, n)."""
        return DenseOp(params[0])


class DenseOp:
    """A dense operator."""

    def __init__(self, A: Tensor) -> None:
        self.A = A
        self.shape = (A.shape[-2], A.shape[-1])
        self.dtype, self.device = A.dtype, A.device
        self.batch = _leading(A, 2)

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = A X."""
        return torch.matmul(self.A, X, out=out)

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = A^H Y."""
        return torch.matmul(self.A.mH, Y, out=out)

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> DenseOp:
        """Return diag(row) A diag(col)."""
        A = self.A
        if row is not None:
            A = A * row.unsqueeze(-1)
        if col is not None:
            A = A * col.unsqueeze(-2)
        return DenseOp(A)

    def column_norms(self) -> Tensor:
        """2-norms of the columns, safe from overflow."""
        if self.shape[0] == 0:
            return self.A.new_zeros((*self.A.shape[:-2], self.shape[1])).abs()
        size = self.A.abs()
        top = size.amax(-2, keepdim=True)
        unit = torch.where(top > 0, top, torch.ones_like(top))
        return (top * torch.linalg.vector_norm(size / unit, dim=-2, keepdim=True)).squeeze(-2)

    def dense(self) -> Tensor:
        """The matrix itself."""
        return self.A


class ScaledOp:
    """diag(row) A diag(col) for an operator whose entries are not at hand."""

    def __init__(self, op: Operator, row: Tensor | None, col: Tensor | None) -> None:
        self.op, self.row, self.col = op, row, col
        self.shape, self.dtype, self.device = op.shape, op.dtype, op.device
        self.batch = _batch_of(op.batch, _leading(row, 1), _leading(col, 1))

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = diag(row) A diag(col) X."""
        Y = self.op.mv(X if self.col is None else self.col.unsqueeze(-1) * X)
        return _into(Y if self.row is None else self.row.unsqueeze(-1) * Y, out)

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = diag(col) A^H diag(row) Y."""
        X = self.op.rmv(Y if self.row is None else self.row.unsqueeze(-1) * Y)
        return _into(X if self.col is None else self.col.unsqueeze(-1) * X, out)

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> ScaledOp:
        """Return diag(row) A diag(col)."""
        return ScaledOp(self.op, _times(self.row, row), _times(self.col, col))

    def column_norms(self) -> None:
        """Not known."""
        return None


class StackedOp:
    """[A; diag(damp)], of shape (m + n, n): damping as extra rows."""

    def __init__(self, op: Any, damp: Tensor) -> None:
        self.op, self.damp = op, damp
        m, n = op.shape
        self.shape = (m + n, n)
        self.dtype, self.device = op.dtype, op.device
        self.batch = _batch_of(op.batch, _leading(damp, 1))

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = [A X; damp X]."""
        m = self.op.shape[0]
        if self.batch is not None and X.ndim == 2:
            X = X.expand(self.batch, *X.shape)
        if out is None:
            out = X.new_empty((*X.shape[:-2], *(self.shape[0], X.shape[-1])))
        if out.ndim == 2:
            self.op.mv(X, out[:m])
        else:
            out[..., :m, :] = self.op.mv(X)
        torch.mul(self.damp.unsqueeze(-1), X, out=out[..., m:, :])
        return out

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = A^H Y1 + damp Y2."""
        m = self.op.shape[0]
        if self.batch is not None and Y.ndim == 2:
            Y = Y.expand(self.batch, *Y.shape)
        X = self.op.rmv(Y[..., :m, :].contiguous())
        return torch.addcmul(X, self.damp.unsqueeze(-1), Y[..., m:, :], out=out)

    def passes(self) -> DampedRows | None:
        """Passes of one column over the rows; None: use products."""
        if self.batch is not None or not isinstance(self.op, SparseOp):
            return None
        rows = self.op.passes()
        return None if rows is None else DampedRows(rows, self.damp)

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> Any:
        """Return [A; diag(damp)] diag(col); rows are not scaled."""
        if row is not None:
            raise ValueError("StackedOp.scaled: only columns can be scaled")
        if col is None:
            return self
        return StackedOp(self.op.scaled(col=col), self.damp * col)

    def column_norms(self) -> Tensor | None:
        """2-norms of the columns of [A; diag(damp)]."""
        norms = self.op.column_norms()
        return None if norms is None else torch.hypot(*torch.broadcast_tensors(norms, self.damp))

    def dense(self) -> Tensor:
        """The stacked matrix as a strided tensor."""
        A = self.op.dense()
        D = torch.diag_embed(self.damp).to(A.dtype)
        lead = broadcast_shapes(A.shape[:-2], D.shape[:-2])
        return torch.cat((A.expand(*lead, *A.shape[-2:]), D.expand(*lead, *D.shape[-2:])), -2)


def column_scale(op: Operator) -> Tensor | None:
    """1 / column norm, 1 for zero columns; None where the norms are not known."""
    norms = op.column_norms()
    if norms is None:
        return None
    scale = torch.where(norms > 0, 1 / norms, torch.ones_like(norms))
    return scale.clamp_(max=torch.finfo(norms.dtype).max)


def _into(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.copy_(value)


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return a if b is None else b
    return a * b
