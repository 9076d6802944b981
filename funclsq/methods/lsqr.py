"""LSQR (Paige & Saunders 1982) for all columns at once.

Greek letters are the scalars of the paper, Latin ones its vectors. Damping is part of the
operator ([A; D]), so the recurrences are those for lambda = 0.

References
----------
C. C. Paige and M. A. Saunders, LSQR: an algorithm for sparse linear equations and sparse least
squares, ACM Trans. Math. Softw. 8 (1982) 43-71, doi:10.1145/355984.355989.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclsq.methods._golub_kahan import GolubKahan, Inverse
from funclsq.methods._krylov import PreparedKrylov
from funclsq.methods._protocol import Options
from funclsq.methods._scalars import Scalars, keep_columns
from funclsq.passes import flat
from funclsq.solution import Method

__all__ = ["Lsqr", "prepare"]


class Lsqr:
    """State of LSQR for min ||b - A x||, x of least norm; ||r|| falls at every step.

    Parameters
    ----------
    op : operator with ``mv`` and ``rmv``
        A, of shape (m, n).
    rhs : Tensor, shape (..., m, k)
        b.
    scalars : Scalars
        Where the Greek letters live.

    inverse : callable, optional
        Applies a preconditioner N^-1, N ~ A^H A; norms in the domain are then those of N.

    Notes
    -----
    Cost of a step: one product each way, seven passes over vectors (two of length m).
    """

    def __init__(
        self, op: Any, rhs: Tensor, scalars: Scalars, inverse: Inverse | None = None
    ) -> None:
        self.scalars = scalars
        self.process = gk = GolubKahan(op, rhs, scalars, inverse)
        one, zero = scalars.full(1.0), scalars.full(0.0)
        # w_1 = v_1,  x_0 = 0,  phibar_1 = beta_1,  rhobar_1 = alpha_1
        self.w, self.x = gk.v.clone(), torch.zeros_like(gk.v)
        self.phibar, self.rhobar = gk.beta, gk.alpha
        self.rnorm, self.arnorm = gk.beta, gk.alpha * gk.beta
        self.anorm, self.acond = gk.alpha, one
        self.alpha_max, self.beta_max = gk.alpha, zero
        self.wnorm, self.stretch_max, self.stretch_min = one, zero, scalars.full(float("inf"))

    def step(self) -> None:
        """Advance x_{k-1} to x_k."""
        s, gk = self.scalars, self.process
        gk.step()
        alpha, beta = gk.alpha, gk.beta  # alpha_{k+1}, beta_{k+1}
        # rho_k = (rhobar_k^2 + beta_{k+1}^2)^(1/2),
        # c_k = rhobar_k / rho_k, s_k = beta_{k+1} / rho_k
        rho = s.hypot(self.rhobar, beta)
        c, sn = s.div(self.rhobar, rho), s.div(beta, rho)
        # theta_{k+1} = s_k alpha_{k+1},  rhobar_{k+1} = -c_k alpha_{k+1}
        theta, self.rhobar = sn * alpha, -c * alpha
        # phi_k = c_k phibar_k,  phibar_{k+1} = s_k phibar_k
        phi, self.phibar = c * self.phibar, sn * self.phibar
        # x_k = x_{k-1} + (phi_k / rho_k) w_k
        # w_{k+1} = v_{k+1} - (theta_{k+1} / rho_k) w_k
        ahead, ratio = s.div(phi, rho), s.div(theta, rho)
        if gk.passes is None:
            s.axpy(self.x, s.live(ahead), self.w)
            s.xpay(self.w, gk.v, s.live(-ratio))
        else:
            w, x = flat(self.w), flat(self.x)
            gk.passes.loops.lsqr_step(flat(gk.v), s.inverse(alpha), w, x, ahead, -ratio)
        # ||r_k|| = phibar_{k+1},  ||A^H r_k|| = phibar_{k+1} alpha_{k+1} |c_k|
        self.rnorm, self.arnorm = self.phibar, self.phibar * alpha * abs(c)
        # A w_k has norm rho_k, and ||w_{k+1}||^2 = 1 + (theta_{k+1} / rho_k)^2 ||w_k||^2, so that
        # rho_k / ||w_k|| lies between the singular values of A;  ||B_k|| <= max alpha + max beta
        stretch = s.div(rho, self.wnorm)
        self.wnorm = s.hypot(s.full(1.0), ratio * self.wnorm)
        self.stretch_max = s.maximum(self.stretch_max, stretch)
        self.stretch_min = s.minimum(self.stretch_min, stretch)
        self.acond = s.div(self.stretch_max, self.stretch_min)
        self.alpha_max = s.maximum(self.alpha_max, alpha)
        self.beta_max = s.maximum(self.beta_max, beta)
        self.anorm = self.alpha_max + self.beta_max

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns of the state."""
        self.process.keep(columns)
        keep_columns(self, ("w", "x"), _SCALARS, columns)


_SCALARS = (
    "phibar",
    "rhobar",
    "rnorm",
    "arnorm",
    "anorm",
    "acond",
    "alpha_max",
    "beta_max",
    "wnorm",
    "stretch_max",
    "stretch_min",
)


def prepare(op: Any, damp: Tensor | None, options: Options, full_rank: bool) -> PreparedKrylov:
    """Make LSQR ready for min ||A x - b||^2 + ||D x||^2; arguments as of :func:`lsmr.prepare`."""
    return PreparedKrylov(Lsqr, Method.lsqr, op, damp, options, full_rank)
