"""Craig's method for A^H A x = g, in one pass over A per step, for a single column.

The process of Golub and Kahan on A^H, started with g,

    beta_1 u_1 = g,   alpha_k v_k = A u_k - beta_k v_{k-1},
    beta_{k+1} u_{k+1} = A^H v_k - alpha_k u_k,

gives A U_k = V_k R_k with R_k upper bidiagonal (alpha on its diagonal, beta above it), and
A^H A U_k = U_k R_k^H R_k + alpha_k beta_{k+1} u_{k+1} e_k^H. The x in the span of U_k whose
residual is orthogonal to it is that of conjugate gradients (see _extended_cg, which does the same
in two passes, and takes blocks, a preconditioner and a part A^H c):

    R_k^H s = beta_1 e_1,   D_k = U_k R_k^-1,   x_k = D_k s,   A x_k = V_k s,

    s_k = -(beta_k / alpha_k) s_{k-1},   d_k = (u_k - beta_k d_{k-1}) / alpha_k,
    x_k = x_{k-1} + s_k d_k,   ||A x_k|| = ||s||,   ||g - A^H A x_k|| = beta_{k+1} |s_k|.

A d_k = v_k is a unit vector, so that 1 / ||d_k|| lies between the singular values of A.

References
----------
E. J. Craig, The N-step iteration procedures, J. Math. Phys. 34 (1955) 64-73,
doi:10.1002/sapm195534164.
C. C. Paige and M. A. Saunders, LSQR: an algorithm for sparse linear equations and sparse least
squares, ACM Trans. Math. Softw. 8 (1982) 43-71, doi:10.1145/355984.355989.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._golub_kahan import in_one_pass, turned
from funclsq.methods._scalars import FloatScalars, one_column
from funclsq.passes import flat

__all__ = ["Craig"]


class Craig:
    """State of Craig's method; ||A (x - x_k)|| falls at every step.

    Parameters
    ----------
    op : operator with ``passes``
        A, of shape (m, n).
    rhs : Tensor, shape (m, 1)
        Zero: it tells the shape.
    scalars : FloatScalars
        Where the Greek letters live.
    g : Tensor, shape (n, 1)
        g, in the range of A^H.

    Notes
    -----
    Cost of a step: one pass, 15 reads or writes of vectors (two of length m).
    """

    def __init__(self, op: Any, rhs: Tensor, scalars: FloatScalars, *, g: Tensor) -> None:
        self.scalars, self._passes = scalars, one_column(op, scalars)
        # beta_1 u_1 = g;  v_0 = d_0 = x_0 = 0
        u = g.clone(memory_format=torch.contiguous_format)
        self._beta = scalars.norm(u)
        scalars.scale(u, scalars.inverse(self._beta))
        self._v = torch.zeros_like(rhs)
        self._length = 1.0  # of v as it is stored
        self._u, self._next = u, torch.empty_like(u)
        self.d, self.x = torch.zeros_like(u), torch.zeros_like(u)
        self._s = -1.0  # so that s_1 = beta_1 / alpha_1
        self.rnorm, self.arnorm, self.anorm, self.acond = 0.0, self._beta, 0.0, 1.0
        self._alpha_max = self._beta_max = self._dnorm = self._stretch_max = 0.0
        self._stretch_min = math.inf

    def step(self) -> None:
        """Advance x_{k-1} to x_k."""
        s, passes, loops = self.scalars, self._passes, self._passes.loops
        u, following, v = flat(self._u), flat(self._next), flat(self._v)
        # alpha_k v_k = A u_k - beta_k v_{k-1}, and A^H of it
        scale = s.div(self._beta, self._length)
        alpha, self._length = in_one_pass(passes, s, u, scale, self._v, v, following)
        # s_k = -(beta_k / alpha_k) s_{k-1}
        # d_k = (u_k - beta_k d_{k-1}) / alpha_k,  x_k = x_{k-1} + s_k d_k
        inverse, ratio = s.inverse(alpha), s.div(self._beta, alpha)
        self._s *= -ratio
        loops.craig_step(u, inverse, flat(self.d), -ratio, flat(self.x), self._s)
        # beta_{k+1} u_{k+1} = A^H v_k - alpha_k u_k
        inverse_length = s.inverse(self._length)
        beta = turned(passes, s, following, inverse_length, u, alpha, self._next)
        s.scale(self._next, s.inverse(beta))
        self._u, self._next = self._next, self._u
        self.rnorm, self.arnorm = s.hypot(self.rnorm, self._s), beta * abs(self._s)
        # ||R_k|| <= max alpha + max beta;  d_{k-1} is in the span of the u before u_k
        self._alpha_max, self._beta_max = max(self._alpha_max, alpha), max(self._beta_max, beta)
        self.anorm = self._alpha_max + self._beta_max
        self._dnorm = s.hypot(inverse, ratio * self._dnorm)
        stretch = s.inverse(self._dnorm)
        self._stretch_max = max(self._stretch_max, stretch)
        self._stretch_min = min(self._stretch_min, stretch)
        self.acond = s.div(self._stretch_max, self._stretch_min)
        self._beta = beta
