"""Sparse (and dense) least squares by Cholesky of the normal equations, refined to QR accuracy.

The method: scale the columns, factor N = B^H B, and solve by corrected semi-normal equations on
the true residual, so that the error is that of a QR factorisation where N is far from singular.
Where it is not, the factor of a slightly shifted N serves as preconditioner, and the few
directions that the shift spoils are treated on their own; that yields the rank as well.

For m < n the normal equations of the second kind are used: with C = A^H,

    A^+ c = C (C^H C)^-1 c,        (A^H A)^+ g = C (C^H C)^-1 (C^+ g),

so one factor of A A^H (m, m), its rows scaled, serves both. Where damping is positive and m < n,
A D^-2 A^H + I is factored if it is the smaller (see _dual).
"""

from __future__ import annotations

import warnings
from typing import TypeAlias

import torch
from torch import Tensor

from funclsq.errors import RankWarning
from funclsq.methods._core import Core, NeedsDense
from funclsq.methods._dual import Dual, worthwhile
from funclsq.methods._gram import predict
from funclsq.methods._normal import flipped, widened
from funclsq.methods._protocol import Options, Raw
from funclsq.methods.svd import tell_false_claim
from funclsq.operators import Operator, StackedOp
from funclsq.solution import Method

__all__ = ["NeedsDense", "predict", "prepare"]

Solved: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, status, steps, A x - c

_ROUGHEST = 1e-6  # relative accuracy below which no refinement stops


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
        Sparse or dense.
    damp : Tensor or None, (n,) or (b, n), real, >= 0
        Diagonal damping.
    options : Options
        ``atol`` is the relative size, at most 1e-6, of the first correction that is not made, as
        foretold by those before or by the residual and the smallest singular value;
        where a damped problem is factored by rows none is left out. ``backend`` names a sparse
        backend; without one the factor is dense where a sparse one would be nearly full (``full``
        says so). ``rcond`` is the rank tolerance, default max(m, n) eps: the rank counts the
        singular values of the column-scaled matrix (row-scaled if it is wide and undamped) above
        ``rcond`` times the largest, after columns whose norm is below ``rcond`` times the largest
        norm have been taken as zero. With ``scale=True`` they are not, and the verdict does not
        depend on the scaling of the columns at all.
    full_rank : bool
        Whether the user asserts full column rank (it is checked all the same).

    Raises
    ------
    ValueError
        If op is matrix-free, or nothing at hand factors its normal matrix where it lies.
    NeedsDense
        If the null space is too large for the sparse method.
    """
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
        m, n = op.shape
        if damp is not None and not bool((damp != 0).any()):
            damp = None
        rcond = options.rcond
        if rcond is None:
            rcond = max(m, n) * torch.finfo(op.dtype).eps
        self.dtype, self.batch = op.dtype, op.batch
        if self.batch is None and damp is not None and damp.ndim == 2:
            self.batch = damp.shape[0]
        op = widened(op, self.batch)
        self._dtype = op.dtype
        if damp is not None:
            damp = damp.to(torch.float64)
            damp = damp if self.batch is None else damp.expand(self.batch, n)
        equivariant = options.scale is True
        goal = min(options.atol or 0.0, _ROUGHEST)
        self._problem: _Tall | _Wide | Dual
        if damp is None and m < n:
            self._problem = _Wide(Core(flipped(op), rcond, options.backend, equivariant, goal))
        elif damp is None:
            self._problem = _Tall(Core(op, rcond, options.backend, equivariant, goal), 0)
        elif worthwhile(op, damp):
            self._problem = Dual(op, damp, rcond, options.backend)
        else:
            stacked = StackedOp(op, damp)
            self._problem = _Tall(Core(stacked, rcond, options.backend, equivariant, goal), n)
        core = self._problem.core
        self.full = core.normal.full
        self.rank: Tensor = core.rank.to(torch.int64)
        deficient = core.deficient
        if isinstance(self._problem, _Wide):
            deficient = torch.ones_like(deficient)
        elif isinstance(self._problem, Dual):  # positive damping
            self.rank, deficient = torch.full_like(self.rank, n), torch.zeros_like(deficient)
        tell_false_claim(self.rank, min(m, n) if damp is None else n, options)
        if damp is None:
            _tell_other_rank(self.rank, options)
        self.deficient = bool(deficient) if self.batch is None else deficient

    @property
    def cond(self) -> Tensor:
        """Estimated condition number, () or (b,); worked out when first asked for."""
        return self._problem.core.cond.to(torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._problem.core.normal.nbytes

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (A^H c + g)."""
        x, status, steps, image = self._problem.solve(self._lift(c), self._lift(g))
        return Raw(x.to(self.dtype), status, steps, None if image is None else image.to(self.dtype))

    def _lift(self, v: Tensor | None) -> Tensor | None:
        if v is None:
            return None
        v = v.to(self._dtype)
        if self.batch is not None and v.ndim == 2:
            v = v.expand(self.batch, *v.shape)
        return v.contiguous()


class _Tall:
    """[A; D] has at least as many rows as columns; the last ``extra`` rows are D."""

    def __init__(self, core: Core, extra: int) -> None:
        self.core, self._extra = core, extra

    def solve(self, c: Tensor | None, g: Tensor | None) -> Solved:
        if c is not None and self._extra:
            c = torch.nn.functional.pad(c, (0, 0, 0, self._extra))
        x, status, steps, image = self.core.solve(c, g)
        if image is not None and self._extra:
            image = image[..., : -self._extra, :]
        return x, status, steps, image


class _Wide:
    """The normal equations of the second kind; ``core`` holds A^H."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def solve(self, c: Tensor | None, g: Tensor | None) -> Solved:
        if g is None:
            return *self.core.image(c), None  # type: ignore[arg-type]
        u, first, before, _ = self.core.solve(g, None)
        x, status, steps = self.core.image(u if c is None else u + c)
        return x, torch.maximum(status, first), steps + before, None


def _tell_other_rank(found: Tensor, options: Options) -> None:
    """Warn if a rank was given that is not the one found: it has no part in the solution."""
    given = options.rank
    if isinstance(given, int) and bool((found != given).any()):
        other = int(found[found != given].flatten()[0])
        warnings.warn(
            f"rank={given} was given, and A has numerical rank {other}: solver='cholesky' goes by "
            "what it finds. Pass solver='qr' or 'svd', which keep the rank given, or rank='auto'.",
            RankWarning,
            stacklevel=2,
        )
