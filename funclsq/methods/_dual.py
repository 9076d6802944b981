"""Damped least squares with fewer rows than columns, through a matrix of the size of the rows.

With C = D^-1 A^H and h = D^-1 g, the solution of (A^H A + D^2) x = A^H c + g is D^-1 (h + w) where

    [w; e] = [C; I] (C^H C + I)^-1 (c - C^H h)

is the least vector with [C^H, I] [w; e] = c - C^H h. As h + w may cancel, the same is applied once
more to what is left, c - A x and g - D^2 x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.methods._core import Core
from funclsq.methods._gram import estimate
from funclsq.methods._normal import flipped
from funclsq.operators import Operator, SparseOp, StackedOp

__all__ = ["Dual", "worthwhile"]

_STRONGEST = 1e5  # largest row of A D^-1 for which the cancellation is harmless


def worthwhile(op: Operator, damp: Tensor) -> bool:
    """Whether A D^-2 A^H + I is cheaper to factor than A^H A + D^2, and safe."""
    m, n = op.shape
    if m >= n or not bool((damp > 0).all()):
        return False
    if isinstance(op, SparseOp) and estimate(op.pattern.T)[0] > estimate(op.pattern)[0]:
        return False
    rows = flipped(op.scaled(col=1 / damp)).column_norms()
    return bool((rows < _STRONGEST).all())  # type: ignore[operator]


class Dual:
    """The damped problem, factored by rows; see the module."""

    def __init__(self, op: Operator, damp: Tensor, rcond: float, backend: str | None) -> None:
        self._op, self._damp = op, damp.unsqueeze(-1)
        ones = damp.new_ones((*damp.shape[:-1], op.shape[0]))
        self.core = Core(StackedOp(flipped(op.scaled(col=1 / damp)), ones), rcond, backend, True)

    def solve(self, c: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return (A^H A + D^2)^-1 (A^H c + g), status and corrections per column."""
        x, status, steps = self._apply(c, g)
        Ax = self._op.mv(x)
        left = -Ax if c is None else c - Ax
        push = self._damp**2 * x
        dx, again, more = self._apply(left, -push if g is None else g - push)
        return x + dx, torch.maximum(status, again), steps + more, None

    def _apply(self, c: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        n = self._op.shape[1]
        if g is None:
            y, status, steps = self.core.image(c)  # type: ignore[arg-type]
            return y[..., :n, :] / self._damp, status, steps
        h = g / self._damp
        through = self._op.mv(h / self._damp)
        y, status, steps = self.core.image(-through if c is None else c - through)
        return (h + y[..., :n, :]) / self._damp, status, steps
