"""Sparse (and dense) least squares by Cholesky of the normal equations, refined to QR accuracy.

The method: scale the columns, factor N = B^H B, and solve by corrected semi-normal equations on
the true residual, so that the error is that of a QR factorisation where N is far from singular.
Where it is not, the factor of a slightly shifted N serves as preconditioner, and the few
directions that the shift spoils are treated on their own; that yields the rank as well.

For m < n the normal equations of the second kind are used: with C = A^H,

    A^+ c = C (C^H C)^-1 c,        (A^H A)^+ g = C (C^H C)^-1 (C^+ g),

so one factor of A A^H (m, m), its rows scaled, serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.operators import Operator, StackedOp
from funclsq.solution import Method
from funclsq.solvers._core import Core, NeedsDense
from funclsq.solvers._gram import predict
from funclsq.solvers._normal import flipped, widened
from funclsq.solvers._protocol import Options, Raw

__all__ = ["NeedsDense", "predict", "prepare"]


def prepare(
    op: Operator, damp: Tensor | None, options: Options, full_rank: bool = False
) -> CholeskyPrepared:
    """Factor the normal equations of [A; diag(damp)] for min ||A x - c||^2 + ||damp x||^2.

    Returns
    -------
    CholeskyPrepared
        Applies G^+ (A^H c + g), G = A^H A + damp^2, to as many columns as given.

    Parameters
    ----------
    op : Operator, (m, n) or a batch
        Sparse or dense, on the CPU.
    damp : Tensor or None, (n,) or (b, n), real, >= 0
        Diagonal damping.
    options : Options
        ``backend`` names a sparse backend. ``rcond`` is the rank tolerance, default max(m, n) eps:
        the rank counts the singular values of the column-scaled matrix (row-scaled if it is wide
        and undamped) above ``rcond`` times the largest, after columns whose norm is below
        ``rcond`` times the largest norm have been taken as zero. With ``scale=True`` they are
        not, and the verdict does not depend on the scaling of the columns at all.
    full_rank : bool
        Whether the user asserts full column rank (it is checked all the same).

    Raises
    ------
    ValueError
        If op is not on the CPU, or is matrix-free.
    NeedsDense
        If the null space is too large for the sparse method.
    """
    if op.device.type != "cpu":
        raise ValueError(
            f"cholesky: A must be on the CPU; got {op.device}. Use solver='lsmr' there, or move "
            "A and b with .cpu()."
        )
    if not hasattr(op, "dense"):
        raise ValueError(
            "cholesky: needs the entries of A, and a LinearOperator has none. Use solver='lsmr'."
        )
    return CholeskyPrepared(op, damp, options, full_rank)


class CholeskyPrepared:
    """A factored problem; see :func:`prepare`."""

    method = int(Method.cholesky)

    def __init__(
        self, op: Operator, damp: Tensor | None, options: Options, full_rank: bool
    ) -> None:
        self.dtype = op.dtype
        m, n = op.shape
        if damp is not None and not bool((damp != 0).any()):
            damp = None
        eps = torch.finfo(op.dtype).eps
        rcond = max(m, n) * eps if options.rcond is None else float(options.rcond)
        batch = op.batch
        if batch is None and damp is not None and damp.ndim == 2:
            batch = damp.shape[0]
        B = widened(op, batch)
        self._m = m
        self._wide = damp is None and m < n
        if self._wide:
            B = flipped(B)
        elif damp is not None:
            d = damp.to(torch.float64)
            B = StackedOp(B, d.expand(batch, n) if batch is not None else d)
        self._stacked = damp is not None
        self._op = B
        self._core = Core(B, rcond, options.backend, equivariant=options.scale is True)
        self.rank: Tensor = self._core.rank.to(torch.int64)
        self.cond: Tensor = self._core.cond.to(torch.float64)
        self.deficient = torch.ones_like(self._core.deficient) if self._wide else (
            self._core.deficient
        )
        if batch is None:
            self.deficient = bool(self.deficient)
        self.batch = batch

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._core.normal.nbytes

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (A^H c + g)."""
        c, g = self._lift(c), self._lift(g)
        core = self._core
        if not self._wide:
            if c is not None and self._stacked:
                c = torch.nn.functional.pad(c, (0, 0, 0, self._op.shape[1]))
            x, status, steps = core.solve(c, g)
            return Raw(x.to(self.dtype), status, steps)
        u, first = c, None
        if g is not None:
            v, first, _ = core.solve(g, None)
            u = v if u is None else u + v
        x, status, steps = core.image(u)
        if first is not None:
            status = torch.maximum(status, first)
        return Raw(x.to(self.dtype), status, steps)

    def _lift(self, v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        v = v.to(self._op.dtype)
        if self.batch is not None and v.ndim == 2:
            v = v.expand(self.batch, *v.shape)
        return v.contiguous()
