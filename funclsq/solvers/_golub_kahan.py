"""Golub-Kahan bidiagonalisation, the process under LSMR and LSQR, for all columns at once.

Golub & Kahan (1965), in the form (Bidiag 1) of Paige & Saunders (1982):

    beta_1 u_1 = b,   alpha_1 v_1 = A^H u_1,
    beta_{k+1} u_{k+1} = A v_k - alpha_k u_k,
    alpha_{k+1} v_{k+1} = A^H u_{k+1} - beta_{k+1} v_k,

with alpha, beta >= 0 such that u and v have unit norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclsq.solvers._scalars import Scalars, keep_columns

__all__ = ["GolubKahan"]


class GolubKahan:
    """State of the process; ``step`` makes one product with A and one with A^H.

    Parameters
    ----------
    op : operator with ``mv`` and ``rmv``
        A, of shape (m, n).
    rhs : Tensor, shape (..., m, k)
        b; not written to.
    scalars : Scalars
        Where alpha and beta live.
    """

    def __init__(self, op: Any, rhs: Tensor, scalars: Scalars) -> None:
        self.op, self.scalars = op, scalars
        # beta_1 u_1 = b
        self.u = rhs.clone(memory_format=torch.contiguous_format)
        self.beta: Any = scalars.norm(self.u)
        scalars.scale(self.u, scalars.div(scalars.full(1.0), self.beta))
        # alpha_1 v_1 = A^H u_1
        self.v = op.rmv(self.u)
        self.alpha: Any = scalars.norm(self.v)
        scalars.scale(self.v, scalars.div(scalars.full(1.0), self.alpha))
        self.u_next, self.v_next = torch.empty_like(self.u), torch.empty_like(self.v)

    def step(self) -> None:
        """Advance alpha, beta, u and v by one index."""
        s = self.scalars
        # beta_{k+1} u_{k+1} = A v_k - alpha_k u_k
        u = self.op.mv(self.v, out=self.u_next)
        s.axpy(u, -self.alpha, self.u)
        self.beta = s.norm(u)
        s.scale(u, s.div(s.full(1.0), self.beta))
        self.u, self.u_next = u, self.u
        # alpha_{k+1} v_{k+1} = A^H u_{k+1} - beta_{k+1} v_k
        v = self.op.rmv(u, out=self.v_next)
        s.axpy(v, -self.beta, self.v)
        self.alpha = s.norm(v)
        s.scale(v, s.div(s.full(1.0), self.alpha))
        self.v, self.v_next = v, self.v

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns of the state."""
        keep_columns(self, ("u", "v", "u_next", "v_next"), ("alpha", "beta"), columns)
