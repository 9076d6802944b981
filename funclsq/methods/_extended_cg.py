"""Conjugate gradients for A^H A x = A^H c + g, with A x carried along, for all columns at once.

With g = 0 this is CGLS (Hestenes & Stiefel 1952; in the stable form of Bjorck, Elfving & Strakos
1998, that makes A^H r from r afresh). With c = 0 one run gives both z = (A^H A)^-1 g and y = A z,
the least-norm solution of A^H y = g: all that a derivative needs. Carrying r = c - A x and forming
s = g + A^H r from it, instead of updating s, keeps the error of y at eps cond(A) in place of
eps cond(A)^2 (Calandra, Gratton, Riccietti & Vasseur 2020).

References
----------
A. Bjorck, T. Elfving and Z. Strakos, Stability of conjugate gradient and Lanczos methods for
linear least squares problems, SIAM J. Matrix Anal. Appl. 19 (1998) 720-736,
doi:10.1137/S089547989631202X.
H. Calandra, S. Gratton, E. Riccietti and X. Vasseur, On iterative solution of the extended normal
equations, SIAM J. Matrix Anal. Appl. 41 (2020) 1571-1589, doi:10.1137/19M1288644.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._golub_kahan import Inverse
from funclsq.methods._scalars import REPRESENTABLE, Scalars, keep_columns, one_column
from funclsq.passes import flat

__all__ = ["ExtendedCg"]


class ExtendedCg:
    """State of CG for A^H A x = A^H c + g; ||A (x - x_k)|| falls at every step.

    Parameters
    ----------
    op : operator with ``mv`` and ``rmv``
        A, of shape (m, n).
    rhs : Tensor, shape (..., m, k)
        c.
    scalars : Scalars
        Where the Greek letters live.
    inverse : callable, optional
        Applies a preconditioner N^-1, N ~ A^H A.
    g : Tensor, shape (..., n, k), or None
        g; in the range of A^H. None means zero.

    Notes
    -----
    Cost of a step: one product each way, six passes over vectors (two of length m).
    """

    def __init__(
        self,
        op: Any,
        rhs: Tensor,
        scalars: Scalars,
        inverse: Inverse | None = None,
        g: Tensor | None = None,
    ) -> None:
        self.op, self.scalars, self.inverse, self.g = op, scalars, inverse, g
        self._passes = one_column(op, scalars)
        # r_0 = c,  s_0 = g + A^H r_0,  t_0 = N^-1 s_0,  p_1 = t_0,  gamma_0^2 = s_0^H t_0
        self.r = rhs.clone(memory_format=torch.contiguous_format)
        self.s = op.rmv(self.r)
        if g is not None:
            self.s.add_(g)
        self.x, self.q = torch.zeros_like(self.s), torch.empty_like(self.r)
        one, zero = scalars.full(1.0), scalars.full(0.0)
        self.rnorm, (t, self.arnorm) = scalars.norm(self.r), self._preconditioned()
        self.p = t.clone()
        self.pnorm = self.arnorm
        self.anorm, self.acond = zero, one
        self.diagonal, self.off = zero, zero  # of the Lanczos matrix that CG builds of A^H A
        self.stretch_max, self.stretch_min = zero, scalars.full(float("inf"))

    def _preconditioned(self) -> tuple[Tensor, Any]:
        """Return t = N^-1 s and (s^H t)^(1/2), which is ||A^H r|| without a preconditioner."""
        if self.inverse is None:
            return self.s, self.scalars.norm(self.s)
        t = self.inverse(self.s)
        return t, self.scalars.inner_norm(self.s, t)

    def step(self) -> None:
        """Advance x_{k-1} to x_k."""
        s, gamma = self.scalars, self.arnorm
        # q_k = A p_k,  alpha_k = (gamma_{k-1} / ||q_k||)^2   (gamma: norms, not squares)
        qnorm = self._image()
        root = s.div(gamma, qnorm)
        alpha = root * root
        # r_k = r_{k-1} - alpha_k q_k,  s_k = g + A^H r_k
        self.rnorm = self._descend(alpha)
        t, self.arnorm = self._preconditioned()
        # x_k = x_{k-1} + alpha_k p_k
        # beta_k = (gamma_k / gamma_{k-1})^2,  p_{k+1} = t_k + beta_k p_k
        ratio = s.div(self.arnorm, gamma)
        beta = ratio * ratio
        if self._passes is None:
            s.axpy(self.x, s.live(alpha), self.p)
            s.xpay(self.p, t, s.live(beta))
        else:
            x, p = flat(self.x), flat(self.p)
            self._passes.loops.cg_step(x, alpha, p, flat(t), beta)
        self._estimate(alpha, beta, ratio, s.div(qnorm, self.pnorm))
        self.pnorm = s.hypot(self.arnorm, beta * self.pnorm)

    def _image(self) -> Any:
        """q = A p, and ||q||."""
        if self._passes is not None:
            square = self._passes.apply(flat(self.p), flat(self.q))
            if REPRESENTABLE[0] < square < REPRESENTABLE[1]:
                return math.sqrt(square)
        else:
            self.op.mv(self.p, out=self.q)
        return self.scalars.norm(self.q)

    def _descend(self, alpha: Any) -> Any:
        """r <- r - alpha q, s = g + A^H r, and ||r||."""
        s = self.scalars
        if self._passes is not None:
            self.s.zero_() if self.g is None else self.s.copy_(self.g)
            square = self._passes.descend(alpha, flat(self.q), flat(self.r), flat(self.s))
            if REPRESENTABLE[0] < square < REPRESENTABLE[1]:
                return math.sqrt(square)
        else:
            s.axpy(self.r, s.live(-alpha), self.q)
            self.s = self.op.rmv(self.r, out=self.s)
            if self.g is not None:
                self.s.add_(self.g)
        return s.norm(self.r)

    def _estimate(self, alpha: Any, beta: Any, ratio: Any, stretch: Any) -> None:
        """Bound ||A|| by the rows of the Lanczos matrix, and cond(A) by ||A p|| / ||p||."""
        s = self.scalars
        inverse = s.inverse(alpha)
        off = ratio * inverse
        row = s.sqrt(inverse + self.diagonal + self.off + off)
        self.anorm = s.maximum(self.anorm, row)
        self.diagonal, self.off = beta * inverse, off
        self.stretch_max = s.maximum(self.stretch_max, stretch)
        self.stretch_min = s.minimum(self.stretch_min, stretch)
        self.acond = s.div(self.stretch_max, self.stretch_min)

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns of the state."""
        vectors = ("r", "s", "p", "x", "q") if self.g is None else ("r", "s", "p", "x", "q", "g")
        keep_columns(self, vectors, _SCALARS, columns)


_SCALARS = (
    "rnorm",
    "arnorm",
    "pnorm",
    "anorm",
    "acond",
    "diagonal",
    "off",
    "stretch_max",
    "stretch_min",
)
