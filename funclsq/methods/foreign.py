"""A user's own solver, solver(A, b) -> x, as a method: with its adjoint it gives derivatives.

The solver is handed one plain least-squares problem, with weights folded in and damping as extra
rows: B = [W^(1/2) A; D], sparse in the layout that A came in, dense if A is. Then

    B^+ c = solver(B, [c; 0]),      G^+ g = solver(B, adjoint_solver(B^H, g)),

where adjoint_solver(B^H, g) is to return the minimum-norm solution of B^H y = g; without one the
solver itself is asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclsq.methods._protocol import Options, Raw
from funclsq.methods.svd import pad_rows
from funclsq.operators import DenseOp, Operator, SparseOp, StackedOp
from funclsq.products import csr_tensor
from funclsq.solution import Method, Solution, Status

__all__ = ["PreparedForeign", "prepare"]


class PreparedForeign:
    """A foreign solver ready for one matrix."""

    method = int(Method.foreign)
    rank = None
    cond = None
    nbytes = 0

    def __init__(self, B: Any, BH: Any, shape: tuple[int, int], options: Options, full: bool):
        self._B, self._BH, self._shape = B, BH, shape
        self._solver = options.solver
        self._adjoint = options.adjoint_solver or options.solver
        self._vector = dict(options.extra).get("vector", False)
        self.deficient = not full

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = B^+ c + (B^H B)^+ g."""
        m, n = self._shape
        total, status = None, None
        if c is not None:
            total, status = self._call(self._solver, self._B, pad_rows(c, m), n, "solver")
        if g is not None:
            y, _ = self._call(self._adjoint, self._BH, g, m, "adjoint_solver")
            z, code = self._call(self._solver, self._B, y, n, "solver")
            total = z if total is None else total + z
            status = code if status is None else torch.maximum(status, code)
        return Raw(total, status, torch.zeros_like(status))

    def _call(self, f: Any, A: Any, b: Tensor, rows: int, name: str) -> tuple[Tensor, Tensor]:
        single = self._vector and b.shape[-1] == 1
        x = f(A, b.squeeze(-1) if single else b)
        status = torch.full((*b.shape[:-2], b.shape[-1]), int(Status.DIRECT), device=b.device)
        if isinstance(x, Solution):
            status = x.status.expand_as(status) if single else x.status
            x = x.x
        want = (*b.shape[:-2], rows) if single else (*b.shape[:-2], rows, b.shape[-1])
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        if not isinstance(x, Tensor) or (got != want and got != (*want, 1)):
            raise ValueError(
                f"lstsq: {name} must return shape {want} for b of shape "
                f"{tuple(b.shape[: b.ndim - single])}; got {got}. Return a tensor of that shape, "
                "or a Solution."
            )
        if x.dtype != b.dtype:
            raise ValueError(f"lstsq: {name} must return dtype {b.dtype}; got {x.dtype}.")
        x = x.detach()
        # a copy: it may be b, or be written over by the next call
        return x.reshape(*b.shape[:-2], rows, b.shape[-1]).clone(), status


def prepare(
    op: Operator, damp: Tensor | None, options: Options, full_rank: bool
) -> PreparedForeign:
    """Lay out B and B^H as the solver expects them."""
    coo = dict(options.extra).get("layout") == "coo"
    shape = op.shape if damp is None else (op.shape[0] + op.shape[1], op.shape[1])
    if isinstance(op, DenseOp):
        B = op.A if damp is None else StackedOp(op, damp).dense()
        return PreparedForeign(B, B.mH, shape, options, full_rank)
    if not isinstance(op, SparseOp):
        B = op if damp is None else StackedOp(op, damp)
        return PreparedForeign(B, _Adjoint(B), shape, options, full_rank)
    if op.batch is not None:
        raise ValueError(
            "lstsq: a function as solver takes one sparse matrix at a time; got a batch of "
            f"{op.batch}. Use a named solver for batches."
        )
    B = op.matrix()
    if damp is not None:
        B = _with_damping_rows(op, damp)
    BH = _adjoint(B)
    if coo:
        B, BH = B.to_sparse_coo(), BH.to_sparse_coo()
    return PreparedForeign(B, BH, shape, options, full_rank)


class _Adjoint:
    """The adjoint of an operator, as an operator."""

    def __init__(self, op: Any) -> None:
        self.shape, self.mv, self.rmv = op.shape[::-1], op.rmv, op.mv
        self.dtype, self.device = op.dtype, op.device


def _with_damping_rows(op: SparseOp, damp: Tensor) -> Tensor:
    m, n = op.shape
    A = op.matrix()
    index = A.crow_indices().dtype
    more = torch.arange(1, n + 1, dtype=index, device=op.device)
    crow = torch.cat((A.crow_indices(), A.crow_indices()[-1:] + more))
    col = torch.cat((A.col_indices(), more - 1))
    return csr_tensor(crow, col, torch.cat((A.values(), damp.to(op.dtype))), (m + n, n))


def _adjoint(B: Tensor) -> Tensor:
    T = B.to_sparse_coo().transpose(0, 1).coalesce()
    values = T.values().conj().resolve_conj() if T.is_complex() else T.values()
    T = torch.sparse_coo_tensor(
        T.indices(), values, T.shape, is_coalesced=True, check_invariants=False
    )
    return T.to_sparse_csr()
