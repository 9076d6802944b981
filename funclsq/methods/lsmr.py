"""LSMR (Fong & Saunders 2011) for all columns at once.

Greek letters are the scalars of the paper (``*bar``, ``*hat``, ``*tilde``, ``*dot``, ``*ddot``
for its accents), Latin ones its vectors. Damping is part of the operator ([A; D]), so the
recurrences are those for lambda = 0.

References
----------
D. C.-L. Fong and M. A. Saunders, LSMR: an iterative algorithm for sparse least-squares problems,
SIAM J. Sci. Comput. 33 (2011) 2950-2971, doi:10.1137/10079687X.
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

__all__ = ["Lsmr", "prepare"]


class Lsmr:
    """State of LSMR for min ||b - A x||, x of least norm; ||A^H r|| falls at every step.

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
        # h_1 = v_1,  hbar_0 = 0,  x_0 = 0
        self.h = gk.v.clone()
        self.hbar, self.x = torch.zeros_like(gk.v), torch.zeros_like(gk.v)
        if gk.passes is not None:
            self._flat = flat(self.h), flat(self.hbar), flat(self.x)
        # alphabar_1 = alpha_1,  zetabar_1 = alpha_1 beta_1,
        # rho_0 = rhobar_0 = cbar_0 = 1,  sbar_0 = 0
        self.alphabar, self.zetabar = gk.alpha, gk.alpha * gk.beta
        self.rho, self.rhobar, self.cbar, self.sbar = one, one, one, zero
        # for ||r_k||: betaddot_1 = beta_1, betadot_0 = 0, rhodot_0 = 1, thetatilde_0 = zeta_0 = 0
        self.betaddot, self.betadot, self.rhodot = gk.beta, zero, one
        self.tautilde, self.thetatilde, self.zeta = zero, zero, zero
        self.rnorm, self.arnorm = gk.beta, scalars.maximum(self.zetabar, zero)
        self.anorm, self.acond = gk.alpha, one
        self.alpha_max, self.beta_max = gk.alpha, zero
        self.hnorm, self.stretch_max, self.stretch_min = one, zero, scalars.full(float("inf"))

    def step(self) -> None:
        """Advance x_{k-1} to x_k."""
        s, gk = self.scalars, self.process
        gk.step()
        alpha, beta = gk.alpha, gk.beta  # alpha_{k+1}, beta_{k+1}
        # P_k: rho_k = (alphabar_k^2 + beta_{k+1}^2)^(1/2), c_k = alphabar_k / rho_k,
        # s_k = beta_{k+1} / rho_k, theta_{k+1} = s_k alpha_{k+1}, alphabar_{k+1} = c_k alpha_{k+1}
        rho_old, rhobar_old = self.rho, self.rhobar
        rho = s.hypot(self.alphabar, beta)
        c, sn = s.div(self.alphabar, rho), s.div(beta, rho)
        theta = sn * alpha
        self.alphabar = c * alpha
        # Pbar_k: thetabar_k = sbar_{k-1} rho_k,
        # rhobar_k = ((cbar_{k-1} rho_k)^2 + theta_{k+1}^2)^(1/2),
        # cbar_k = cbar_{k-1} rho_k / rhobar_k, sbar_k = theta_{k+1} / rhobar_k,
        # zeta_k = cbar_k zetabar_k, zetabar_{k+1} = -sbar_k zetabar_k
        thetabar, rhotemp = self.sbar * rho, self.cbar * rho
        rhobar = s.hypot(rhotemp, theta)
        self.cbar, self.sbar = s.div(rhotemp, rhobar), s.div(theta, rhobar)
        zeta_old, zeta = self.zeta, self.cbar * self.zetabar
        self.zetabar = -self.sbar * self.zetabar
        # hbar_k = h_k - (thetabar_k rho_k / (rho_{k-1} rhobar_{k-1})) hbar_{k-1}
        # x_k = x_{k-1} + (zeta_k / (rho_k rhobar_k)) hbar_k
        # h_{k+1} = v_{k+1} - (theta_{k+1} / rho_k) h_k
        back, ahead = -s.div(thetabar * rho, rho_old * rhobar_old), s.div(zeta, rho * rhobar)
        ratio = s.div(theta, rho)
        if gk.passes is None:
            s.xpay(self.hbar, self.h, s.live(back))
            s.axpy(self.x, s.live(ahead), self.hbar)
            s.xpay(self.h, gk.v, s.live(-ratio))
        else:
            h, hbar, x = self._flat
            gk.passes.loops.lsmr_step(flat(gk.v), s.inverse(alpha), h, back, hbar, ahead, x, -ratio)
        self.rho, self.rhobar, self.zeta = rho, rhobar, zeta
        self._estimate(c, sn, thetabar, zeta_old)
        # A h_k has norm rho_k, and ||h_{k+1}||^2 = 1 + (theta_{k+1} / rho_k)^2 ||h_k||^2, so that
        # rho_k / ||h_k|| lies between the singular values of A;  ||B_k|| <= max alpha + max beta
        stretch = s.div(rho, self.hnorm)
        self.hnorm = s.hypot(s.full(1.0), ratio * self.hnorm)
        self.stretch_max = s.maximum(self.stretch_max, stretch)
        self.stretch_min = s.minimum(self.stretch_min, stretch)
        self.acond = s.div(self.stretch_max, self.stretch_min)
        self.alpha_max = s.maximum(self.alpha_max, alpha)
        self.beta_max = s.maximum(self.beta_max, beta)
        self.anorm = self.alpha_max + self.beta_max

    def _estimate(self, c: Any, sn: Any, thetabar: Any, zeta_old: Any) -> None:
        """Update ||r_k|| and ||A^H r_k|| (section 5 of the paper)."""
        s = self.scalars
        # betahat_k = c_k betaddot_k, betaddot_{k+1} = -s_k betaddot_k
        betahat, self.betaddot = c * self.betaddot, -sn * self.betaddot
        # Ptilde_{k-1}: rhotilde_{k-1} = (rhodot_{k-1}^2 + thetabar_k^2)^(1/2)
        rhotilde = s.hypot(self.rhodot, thetabar)
        ctilde, stilde = s.div(self.rhodot, rhotilde), s.div(thetabar, rhotilde)
        thetatilde_old = self.thetatilde
        self.thetatilde, self.rhodot = stilde * self.rhobar, ctilde * self.rhobar
        self.betadot = ctilde * betahat - stilde * self.betadot
        # tautilde_{k-1} = (zeta_{k-1} - thetatilde_{k-1} tautilde_{k-2}) / rhotilde_{k-1}
        self.tautilde = s.div(zeta_old - thetatilde_old * self.tautilde, rhotilde)
        # taudot_k = (zeta_k - thetatilde_k tautilde_{k-1}) / rhodot_k
        taudot = s.div(self.zeta - self.thetatilde * self.tautilde, self.rhodot)
        # ||r_k|| = ((betadot_k - taudot_k)^2 + betaddot_{k+1}^2)^(1/2),
        # ||A^H r_k|| = |zetabar_{k+1}|
        self.rnorm = s.hypot(self.betadot - taudot, self.betaddot)
        self.arnorm = abs(self.zetabar)

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns of the state."""
        self.process.keep(columns)
        keep_columns(self, ("h", "hbar", "x"), _SCALARS, columns)


_SCALARS = (
    "alphabar",
    "zetabar",
    "rho",
    "rhobar",
    "cbar",
    "sbar",
    "betaddot",
    "betadot",
    "rhodot",
    "tautilde",
    "thetatilde",
    "zeta",
    "rnorm",
    "arnorm",
    "anorm",
    "acond",
    "alpha_max",
    "beta_max",
    "hnorm",
    "stretch_max",
    "stretch_min",
)


def prepare(op: Any, damp: Tensor | None, options: Options, full_rank: bool) -> PreparedKrylov:
    """Make LSMR ready for min ||A x - b||^2 + ||D x||^2; see :class:`PreparedKrylov`.

    Parameters
    ----------
    op : operator
        A, of shape (m, n), weights folded in.
    damp : Tensor, shape (n,) or (B, n), or None
        Diagonal of D, real and not negative.
    options : Options
        ``atol``, ``btol``, ``conlim``, ``maxiter``, ``scale``, ``preconditioner``, ``callback``,
        ``progress``.
    full_rank : bool
        Whether A is known to be of full column rank.

    Returns
    -------
    PreparedKrylov
        Ready to solve.
    """
    return PreparedKrylov(Lsmr, Method.lsmr, op, damp, options, full_rank)
