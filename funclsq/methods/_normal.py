"""The factored normal matrix of a column-scaled operator, and its use as a preconditioner.

For B, (m, n), of any row scaling: S = diag(powers of two that bring every column norm of B to
about one; 1/2 for zero columns), N = (B S)^H (B S) + shift I, factored. ``apply`` is
N^-1, corrected on the few directions that the shift spoils where they are known.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import spare
from funclsq.backends import NotPositive, dense, device_backend
from funclsq.methods._dense_rows import Border, dense_rows, sparse_part
from funclsq.methods._device_gram import Full, Upper, sums_of
from funclsq.methods._gram import Gram, estimate, full_square, gram_of
from funclsq.methods._layout import factored
from funclsq.operators import DenseOp, Operator, SparseOp, StackedOp

__all__ = ["DENSE_FILL", "DENSE_ORDER", "Normal", "flipped", "widened"]

DENSE_FILL = 0.15  # from this density of N on, and up to DENSE_ORDER, N is factored dense
DENSE_ORDER = 8192
SMALL_ORDER = 64  # N of a batch is factored dense up to this order whatever its density
_SHIFTS = 8  # a shift is raised at most so often


class Normal:
    """N = (B S)^H (B S) + shift I in factored form, one or a batch.

    Attributes
    ----------
    B : Operator
        The scaled operator B S, in double precision.
    scale : Tensor, (n,) or (b, n)
        The diagonal of S.
    filled : Operator
        The same with one more row for each column, holding 1 where ``zero`` does.
    zero : bool Tensor, as ``scale``
        Columns of B that are zero, or below ``negligible`` times the largest one.
    holes : bool
        Whether there are such columns.
    broken : bool Tensor, () or (b,)
        Whether B holds a NaN or an infinity (it is taken as zero then).
    shift : float
        What was added to the diagonal.
    """

    def __init__(self, B: Operator, backend: str | None = None, negligible: float = 0.0) -> None:
        norms = B.column_norms()
        self.broken = ~torch.isfinite(norms).all(-1)
        if bool(self.broken.any()):
            B = _blanked(B, self.broken)
            norms = torch.where(self.broken.unsqueeze(-1), 0, norms)
        top = norms.amax(-1, keepdim=True) if norms.numel() else norms
        self.zero = norms <= negligible * top
        exponent = torch.frexp(torch.where(self.zero, 1, norms))[1]
        scale = torch.ldexp(torch.ones_like(norms), (-exponent).clamp(-1000, 1000))
        self.scale = torch.where(self.zero & (norms > 0), 0, scale)
        self._lengths = torch.where(self.zero, 1, norms * scale)  # of the columns as N has them
        self.B = B.scaled(col=self.scale)
        # with a unit in each zero column, as N has it: nothing is null but what is truly so
        self.holes = bool(self.zero.any())
        self.filled = StackedOp(self.B, self.zero.to(norms.dtype)) if self.holes else self.B
        self.n = B.shape[1]
        self.batch = B.batch
        self.shift = 0.0
        self.eps = float(torch.finfo(norms.dtype).eps)
        self._name = backend
        self._form()

    # Forming and factoring

    def _form(self) -> None:
        op, damp = self.B, None
        if isinstance(op, StackedOp):
            op, damp = op.op, op.damp
        self._gram: Gram | None = None
        self._again = False  # N is cheap: it is factored where it lies, and formed again if needed
        self._upper: Upper | None = None  # of a sparse N on a device
        self._rows: Tensor | None = None  # the dense rows, kept out of N
        self._border: Border | None = None
        if isinstance(op, SparseOp):
            small = self.batch is not None and self.n <= SMALL_ORDER
            full = self.n <= DENSE_ORDER and estimate(op.pattern)[1] > DENSE_FILL
            if _elsewhere(op):
                self._form_there(op, self._extra(damp), small or full)
                return
            v = op.csr_values.numpy()
            if not (small or full):
                apart = dense_rows(op.pattern)
                if apart is not None:
                    self._rows, v = apart.written_out(op.csr_values), v[..., apart.kept]
                self._gram = gram_of(sparse_part(op.pattern))
                self._values = self._gram.values(v)
                self._values[..., self._gram.diagonal] += self._extra(damp).numpy()
                return
            if self.batch is None:
                N = full_square(op.pattern, v)
            else:
                N = gram_of(op.pattern).written_out(v)
                N.diagonal(dim1=-2, dim2=-1).copy_(self._lengths.square())
                self._values, self._again = N, True
                return
        else:
            A = op.dense()
            N = (A.mT @ A.conj()).mT  # A^H A, stored by columns
        N.diagonal(dim1=-2, dim2=-1).add_(self._extra(damp))
        self._values = N

    def _form_there(self, op: SparseOp, extra: Tensor, full: bool) -> None:
        """The same on a device: sparse where cuDSS factors it, else written out."""
        v = op.csr_values
        if not full and device_backend(self._name, op.device, self.n, DENSE_ORDER) is not None:
            self._upper = sums_of(Upper, op.pattern, op.device)
            self._values = self._upper.triangle(v, extra)
            return
        N = sums_of(Full, op.pattern, op.device).matrix(v)
        N.diagonal(dim1=-2, dim2=-1).add_(extra)
        self._values = N

    def _extra(self, damp: Tensor | None) -> Tensor:
        """What comes on the diagonal: damping, and 1 for zero columns."""
        ones = self.zero.to(self.B.dtype)
        return ones if damp is None else ones + damp**2

    def factor(self, shift: float = 0.0, single: bool = False) -> None:
        """Factor N + shift I; raises NotPositive if it is not positive definite.

        ``single`` allows a large dense factor of one matrix to be in single precision.
        """
        self.shift = shift
        single &= self.batch is None and self.n >= dense.SINGLE_ORDER
        if self._values is None:
            self._form()
        if self._upper is not None:
            self._factor: Any = self._upper.factored(self._values, shift)
            return
        if self._gram is None:
            N = self._values
            single &= N.device.type == "cpu"
            if shift:
                N = N + shift * torch.eye(self.n, dtype=N.dtype, device=N.device)
            elif self._again:
                self._values = None
            self._factor = dense.factor(N, single, self._values is None)
            return
        values = self._values
        if shift:
            values = values.copy()
            values[..., self._gram.diagonal] += shift
        # by rows here and by columns there, and the columns of N are its rows conjugated
        data = values.conj() if np.iscomplexobj(values) else values
        data = data.reshape(-1)
        self._factor = factored(self._gram, self._name, self.batch, data, single)
        if self._rows is not None:
            self._border = Border(self._rows, self._solve_factored, shift > 0)

    @property
    def cond_bound(self) -> float:
        """At least the condition number of B S (of any member), from its damping alone.

        The columns of B S are no longer than one, so that its singular values are at most n^(1/2);
        they are at least the smallest entry of D S.
        """
        if not isinstance(self.B, StackedOp) or self.n == 0:
            return math.inf
        floor = float(torch.where(self.zero, 1, self.B.damp.abs()).amin())
        return math.sqrt(self.n) / floor if floor > 0 else math.inf

    @property
    def full(self) -> bool:
        """Whether a sparse operator has a dense factor."""
        op = self.B.op if isinstance(self.B, StackedOp) else self.B
        return isinstance(op, SparseOp) and isinstance(self._factor, dense.FACTORS)

    @property
    def single(self) -> bool:
        """Whether the factor is in single precision."""
        return isinstance(self._factor, dense.FACTORS) and self._factor.single

    def settle(self) -> None:
        """Let go of N: it will not be factored again."""
        self._values = None

    def positive(self) -> bool:
        """Whether every pivot of the factor came out positive."""
        return self._factor.positive()

    def factor_shifted(self, shift: float) -> None:
        """Factor N + shift I, the shift raised until every pivot is positive."""
        for _ in range(_SHIFTS):
            try:
                self.factor(shift=shift)
                if self.positive():
                    return
            except NotPositive:
                pass
            shift *= 16
        raise NotPositive("the normal matrix is not positive definite even when shifted")

    @property
    def nbytes(self) -> int:
        """Bytes held: the factor, the scaled operator, and N while it may be factored again."""
        held = self._factor.nbytes + (0 if self._values is None else self._values.nbytes)
        held += 0 if self._border is None else self._border.nbytes
        op = self.B.op if isinstance(self.B, StackedOp) else self.B
        held += 2 * op.csr_values.nbytes if isinstance(op, SparseOp) else op.dense().nbytes
        return held

    # Application

    def solve(self, q: Tensor) -> Tensor:
        """(N + shift)^-1 q by the factor, q (..., n, k)."""
        if q.shape[-1] == 0 or q.numel() == 0:
            return torch.zeros_like(q)
        if self._gram is None:
            return self._factor.solve(q)
        return self._solve_factored(q) if self._border is None else self._border.solve(q)

    def _solve_factored(self, q: Tensor) -> Tensor:
        flat = q.reshape(-1, q.shape[-1]).numpy()
        x = self._factor.solve(flat)
        return torch.from_numpy(np.ascontiguousarray(x)).view(q.shape)


def _elsewhere(op: Operator) -> bool:
    """Whether the numbers of op are not on the CPU."""
    return op.device.type != "cpu"


def _blanked(op: Operator, broken: Tensor) -> Operator:
    """The operator with zero in place of the members that are not finite."""
    if isinstance(op, StackedOp):
        return StackedOp(_blanked(op.op, broken), torch.where(broken.unsqueeze(-1), 0, op.damp))
    if isinstance(op, SparseOp):
        return SparseOp(op.pattern, torch.where(broken.unsqueeze(-1), 0, op.csr_values))
    return DenseOp(torch.where(broken[..., None, None], 0, op.dense()))


def flipped(op: Operator) -> Operator:
    """A^H as an operator of its own."""
    if isinstance(op, SparseOp):
        p = op.pattern
        values = spare.taken(op.csr_values, p.tensor("t_perm", op.device))
        return SparseOp(p.T, values.conj().resolve_conj())
    return DenseOp(op.dense().mH.resolve_conj().contiguous())


def widened(op: Operator, batch: int | None) -> Operator:
    """The operator in double precision, expanded to a batch where it has none."""
    double = torch.complex128 if op.dtype.is_complex else torch.float64
    if isinstance(op, SparseOp):
        values = op.csr_values.to(double)
        if batch is not None and op.batch is None:
            values = values.expand(batch, -1).contiguous()
        return SparseOp(op.pattern, values)
    A = op.dense().to(double)
    return DenseOp(A.expand(batch, *A.shape) if batch is not None and op.batch is None else A)
