"""When the first correction of a solution need not be made, told without making it.

Let x = P h be a first solution of B^H B x = h = B^H c + g, with P near (B^H B)^-1 and the columns
of B about one long. What it leaves is q = h - B^H B x, and its correction is dx = P q.

By a bound. With sigma no more than the smallest singular value of B, |dx| <= |q| / sigma^2 and
|B dx| <= |q| / sigma. Where less than full accuracy is asked for, that may be enough.

By the backward error, where c is absent. With f = B dx and F = f x^H / |x|^2,

    B^H (B + F) x = B^H B x + B^H B dx = g,

so that x is exact for a matrix as far from B as |F| = |B dx| / |x| (no shorter f serves). Rounding
the entries moves B by eps |B|, and so does a QR factorisation. A correction of one or two such
units brings x nearer to the solution for the entries given, but no nearer than their last digits,
or QR, could move it. How long B dx would be is estimated from q:

    |B dx| = t |q|,    t = |B P q'| / |q'|,

seen where a correction was made, of a solve with c before: its residual q' had come from the same
rounding errors, those of N and of its factor. The benchmarks print the estimate for a gradient by
what |B dx| is (0.5 to 1.5 on ten problems). As it is no more than an estimate, the bound above has
to exclude that it is wrong by orders of magnitude.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from funclsq.norms import column_norms

__all__ = ["Foresight", "norms"]

_QUARTER = 0.25  # of the goal, which what is not made comes to at most
_UNITS = 2.0  # of rounding, that a backward error may be by the estimate
_MOST_UNITS = 5e3  # and by the bound


def norms(v: Tensor) -> np.ndarray:
    """The norm of each column."""
    return column_norms(v).cpu().numpy()


class Foresight:
    """What is known of B and of P before a solve; arrays of shape (), or (b, 1) for a batch.

    Parameters
    ----------
    floor : array
        Lower bound of the singular values of B.
    eps : float
        The unit of rounding.
    loose : bool
        Whether less than full accuracy is asked for.
    """

    def __init__(self, floor: np.ndarray, eps: float, loose: bool) -> None:
        self.floor, self.eps, self.loose = floor, eps, loose
        self.response: np.ndarray | None = None  # t, of the first solve that shows it

    def needless(
        self, q: Tensor, start: np.ndarray, whole: np.ndarray | None, goal: float, kind: str
    ) -> np.ndarray:
        """Whether the first correction is to be left out, per column.

        Parameters
        ----------
        q : Tensor, (..., n, k)
            The residual that it is for.
        start : array, (..., k)
            |x|; of an image B x, |g|.
        whole : array or None
            |B x|, None where it does not count.
        goal : float
            Relative size of what may be left out, where less than full accuracy is asked for.
        kind : str
            "c" where c takes part, "g" where it is absent, "image" for B x instead of x.
        """
        told = kind == "g" and self.response is not None
        out = np.zeros(start.shape, dtype=bool)
        if not (self.loose or told):
            return out
        residual = norms(q)
        if self.loose:
            out |= self._bounded(residual, start, whole, goal, kind == "image")
        if told:
            out |= self._stable(residual, start)
        return out

    def see(self, q: Tensor, power: np.ndarray) -> None:
        """Take note of |B dx|, the power of the correction dx = P q made to a solve with c."""
        if self.response is None:
            seen = np.fmax.reduce(power / norms(q), axis=-1, keepdims=True)
            if np.isfinite(seen).any():
                self.response = seen

    def _bounded(self, residual, start, whole, goal, image):
        """Whether the correction is below the goal whatever its direction."""
        sizes = [residual / start if image else residual / self.floor**2 / start]
        if whole is not None:
            sizes.append(residual / self.floor / whole)
        return np.all([relative <= _QUARTER * goal for relative in sizes], axis=0)

    def _stable(self, residual, length):
        """Whether x has a backward error of rounding as it is."""
        unit = self.eps * length
        likely = self.response * residual <= _UNITS * unit
        return likely & (residual <= _MOST_UNITS * unit * self.floor)
