"""Golub-Kahan bidiagonalisation, the process under LSMR and LSQR, for all columns at once.

Golub & Kahan (1965), in the form (Bidiag 1) of Paige & Saunders (1982):

    beta_1 u_1 = b,   alpha_1 v_1 = A^H u_1,
    beta_{k+1} u_{k+1} = A v_k - alpha_k u_k,
    alpha_{k+1} v_{k+1} = A^H u_{k+1} - beta_{k+1} v_k,

with alpha, beta >= 0 such that u and v have unit norm. With a preconditioner N ~ A^H A, norms of v
are those of N (Arridge, Betcke & Harhanen 2014, which needs no factor of N): p = N v is carried
along, alpha p = A^H u - beta p, v = N^-1 p, p^H v = 1.

References
----------
S. R. Arridge, M. M. Betcke and L. Harhanen, Iterated preconditioned LSQR method for inverse
problems on unstructured grids, Inverse Problems 30 (2014) 075009,
doi:10.1088/0266-5611/30/7/075009.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._scalars import REPRESENTABLE, Scalars, keep_columns, one_column
from funclsq.passes import flat

__all__ = ["GolubKahan", "Inverse", "in_one_pass", "turned"]

Inverse = Callable[[Tensor], Tensor]


class GolubKahan:
    """State of the process; ``step`` makes one product with A and one with A^H.

    Where ``passes`` is not None they come as one, and ``step`` leaves v with the length alpha.

    Parameters
    ----------
    op : operator with ``mv`` and ``rmv``
        A, of shape (m, n).
    rhs : Tensor, shape (..., m, k)
        b; not written to.
    scalars : Scalars
        Where alpha and beta live.
    inverse : callable, optional
        Applies N^-1 to a block of columns.
    """

    def __init__(
        self, op: Any, rhs: Tensor, scalars: Scalars, inverse: Inverse | None = None
    ) -> None:
        self.op, self.scalars, self.inverse = op, scalars, inverse
        self.passes = one_column(op, scalars) if inverse is None else None
        # beta_1 u_1 = b
        self.u = rhs.clone(memory_format=torch.contiguous_format)
        self.beta: Any = scalars.norm(self.u)
        scalars.scale(self.u, scalars.inverse(self.beta))
        self._length: Any = 1.0  # of u as it is stored
        # alpha_1 v_1 = A^H u_1
        self.p = op.rmv(self.u)
        self._normalise(self.p)
        self.p_next = torch.empty_like(self.p)
        if self.passes is None:
            self.u_next = torch.empty_like(self.u)
        else:
            vectors = (self.u, self.p, self.p_next)
            self._flat_u, self._flat_p, self._flat_next = (flat(t) for t in vectors)

    def _normalise(self, p: Tensor) -> None:
        """Scale p so that p^H v = 1; v is p itself without a preconditioner."""
        s = self.scalars
        if self.inverse is None:
            self.alpha: Any = s.norm(p)
            s.scale(p, s.inverse(self.alpha))
            self.v = p
        else:
            v = self.inverse(p)
            self.alpha = s.inner_norm(p, v)
            s.scale(p, s.inverse(self.alpha))
            s.scale(v, s.inverse(self.alpha))
            self.v = v

    def step(self) -> None:
        """Advance alpha, beta, u and v by one index."""
        s = self.scalars
        if self.passes is not None:
            self._step_in_one_pass(self.passes)
            return
        # beta_{k+1} u_{k+1} = A v_k - alpha_k u_k
        u = self.op.mv(self.v, out=self.u_next)
        s.axpy(u, -self.alpha, self.u)
        self.beta = s.norm(u)
        s.scale(u, s.inverse(self.beta))
        self.u, self.u_next = u, self.u
        # alpha_{k+1} v_{k+1} = A^H u_{k+1} - beta_{k+1} v_k
        p = self.op.rmv(u, out=self.p_next)
        s.axpy(p, -self.beta, self.p)
        self._normalise(p)
        self.p, self.p_next = p, self.p

    def _step_in_one_pass(self, passes: Any) -> None:
        """The same with one pass over A: beta_{k+1} u_{k+1} is stored, and A^H of it made at once.

        So u is gone through once in a step; its length is known when all of A^H u has been added.
        What is left to do is to divide v by alpha, which its user does on the way.
        """
        s, u, old, p = self.scalars, self._flat_u, self._flat_p, self._flat_next
        scale = s.div(self.alpha, self._length)
        self.beta, self._length = in_one_pass(passes, s, old, scale, self.u, u, p)
        inverse = s.inverse(self._length)
        self.alpha = turned(passes, s, p, inverse, old, self.beta, self.p_next)
        self.p, self.p_next = self.p_next, self.p
        self._flat_p, self._flat_next = p, old
        self.v = self.p

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns of the state."""
        keep_columns(self, ("u", "v", "u_next", "p", "p_next"), ("alpha", "beta"), columns)


def in_one_pass(
    passes: Any, scalars: Any, x: Any, scale: float, U: Tensor, u: Any, p: Any
) -> tuple[float, float]:
    """u <- A x - scale u, p <- A^H u for arrays, u that of U; ||u||, and the length u is left with.

    Where the square of ||u|| leaves the range, u is given the length one and p made again.
    """
    p.fill(0)
    square = passes.through(x, scale, u, p)
    if REPRESENTABLE[0] < square < REPRESENTABLE[1]:
        norm = math.sqrt(square)
        return norm, norm
    norm = scalars.norm(U)
    scalars.scale(U, scalars.inverse(norm))
    p.fill(0)
    passes.adjoint(u, p)
    return norm, 1.0


def turned(passes: Any, scalars: Any, p: Any, a: float, old: Any, b: float, P: Tensor) -> float:
    """p <- a p - b old for arrays, p that of P; ||p||."""
    square = passes.loops.turn(p, a, old, b)
    if REPRESENTABLE[0] < square < REPRESENTABLE[1]:
        return math.sqrt(square)
    return scalars.norm(P)
