"""Least squares with the factored normal matrix, for an operator of any column rank.

The operator has at least as many rows as columns, damping included.
The factor is used as it comes where cond(B S)^2 leaves room below 1/eps. Otherwise it is shifted,
and the singular directions that the shift spoils are found and treated on their own; those below
the rank tolerance are the null space.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from funclsq.backends import NotPositive
from funclsq.methods._needless import Foresight
from funclsq.methods._normal import Normal
from funclsq.methods._nullspace import Small, glimpse, largest, qr, small_directions, smallest
from funclsq.methods._refine import refine, refine_image
from funclsq.norms import column_norms
from funclsq.operators import Operator
from funclsq.solution import Status

__all__ = ["Core", "NeedsDense"]

EASIEST = 20.0  # up to this one a factor in single precision contracts by 1e-4
EASY = 1e6  # up to this condition number the plain factor contracts fast enough
_SLACK = 20.0  # times the rank tolerance that a residual of the equations may be
_FULLY = 8.0  # units of rounding up to which full accuracy is asked for
_QUICK = 3  # corrections after which a factor of an easy matrix is not believed unseen
_UNEVEN = 10.0  # from which ratio of their lengths on null vectors are sharpened twice
MARGIN = 10.0  # full rank is sure if the smallest singular value is so far above the tolerance


class NeedsDense(Exception):
    """The null space is too large for the sparse method; a dense rank-revealing one is needed."""


class Core:
    """G = B^H B factored, with the rank of B; ``solve`` applies G^+ (B^H c + g).

    Solutions are refined until the next correction is foretold to be below ``goal`` relative to
    the solution, or below rounding.

    Attributes
    ----------
    rank : Tensor, () or (b,) int64
        Singular values of the column-scaled B above ``rcond`` times the largest.
    top : Tensor, () or (b,)
        Estimated largest singular value of the column-scaled B; worked out when first asked for.
    cond : Tensor, () or (b,)
        Estimated condition number of the column-scaled B on its rank; likewise.
    deficient : Tensor, () or (b,) bool
        Whether the columns may be dependent.
    """

    def __init__(
        self,
        B: Operator,
        rcond: float,
        backend: str | None,
        equivariant: bool = False,
        goal: float = 0.0,
    ) -> None:
        self.normal = Normal(B, backend, 0.0 if equivariant else rcond)
        self._goal = max(goal, self.normal.eps)
        self._tolerance = _SLACK * max(rcond, self._goal)
        self.small: Small | None = None
        self.null: Tensor | None = None  # orthonormal null vectors of B itself, zero-padded
        columns = self.normal.n - self.normal.zero.sum(-1)
        self.rank = columns
        self._top: Tensor | None = None
        self._first: tuple[Tensor, Tensor] | None = None
        self._bottom: Tensor | None = None
        self._cond: Tensor | None = None
        self.deficient = self.normal.zero.any(-1)
        if not self._plainly(rcond):
            self._carefully(rcond)
        self.normal.settle()

    def _plainly(self, rcond: float) -> bool:
        """Factor N as it is; False if it is too ill-conditioned for that."""
        most = min(EASY, 1 / (MARGIN * max(rcond, 1e-300)))
        fits = self._factored(single=True)
        if fits and self.normal.single and not self._below(min(EASIEST, most)):
            fits = self._factored(single=False)
        return fits and self._below(most)

    def _factored(self, single: bool) -> bool:
        """Factor N; False if it is numerically singular."""
        self._first = self._bottom = self._cond = None
        try:
            self.normal.factor(single=single)
        except NotPositive:
            return False
        return self.normal.positive()  # a backend may not mind

    def _below(self, most: float) -> bool:
        """Whether the condition number is: by the first of four ways to know, each dearer.

        Damping bounds it. So does the smallest singular value alone, as the columns of B S are no
        longer than one and the largest is n^(1/2) at most. One step of inverse iteration has a
        margin of ten, with which it tells at least as surely as two steps without while the random
        start is no further from the smallest direction than R = 1e8 (_nullspace.smallest). Beyond
        that, at a chance of about 1e-4 n^(1/2) at most, a condition number that exceeds the limit
        may be missed; in experiments with one small singular value, at R = 1e16 and more.
        """
        if self.normal.cond_bound < most:
            return True
        longest = math.sqrt(self.normal.n)
        if longest < most and bool((longest / self._begun()[1] < most / MARGIN).all()):
            return True
        if bool((longest / self._smallest() < most).all()):
            return True
        return bool((self.cond < most).all())

    def _begun(self) -> tuple[Tensor, Tensor]:
        if self._first is None:
            self._first = glimpse(self.normal)
        return self._first

    def _smallest(self) -> Tensor:
        if self._bottom is None:
            self._bottom = smallest(self.normal, self._begun()[0])
        return self._bottom

    @property
    def top(self) -> Tensor:
        """See the attributes."""
        if self._top is None:
            self._top = largest(self.normal)
        return self._top

    @property
    def cond(self) -> Tensor:
        """See the attributes."""
        if self._cond is None:
            self._cond = torch.where(self.top > 0, self.top / self._smallest(), 1.0)
        return self._cond

    def _carefully(self, rcond: float) -> None:
        """Shift, and find the directions that the shift spoils."""
        normal, n = self.normal, self.normal.n
        try:
            normal.factor_shifted(16 * n**0.5 * normal.eps)
        except NotPositive as error:
            raise NeedsDense(str(error)) from None
        limit = (2 * MARGIN * rcond * self.top).clamp(min=(10 * normal.shift) ** 0.5)
        most = min(n, max(64, min(n // 4, 1024)))
        small = small_directions(normal, limit, rcond * self.top, most)
        tolerance = (rcond * self.top).unsqueeze(-1)
        nulls = small.sigma <= tolerance
        if not small.complete and bool(nulls.all(-1).any()):
            raise NeedsDense(f"more than {most} of {n} columns are dependent")
        self.small = small
        count = nulls.sum(-1)
        self.rank = self.rank - count
        seen = torch.where(nulls, torch.inf, small.sigma)
        bottom = torch.cat((seen, small.next.unsqueeze(-1)), -1).amin(-1)
        bottom = torch.where(torch.isinf(bottom), self.top, bottom)
        self._cond = self.top / bottom
        self.deficient = self.deficient | (bottom <= MARGIN * tolerance.squeeze(-1)) | (count > 0)
        self._weights = torch.where(
            nulls, 0.0, 1 / small.sigma.clamp(min=1e-300) ** 2 - 1 / (small.sigma**2 + normal.shift)
        )
        self._nulls = torch.where(nulls.unsqueeze(-2), small.V, 0)
        if bool(nulls.any()):
            self._purify(nulls)

    def _purify(self, nulls: Tensor) -> None:
        """Sharpen the null vectors, V <- (I - B^+ B) V, and orthonormalise them unscaled.

        Unscaled, those of short columns are long and drown the others, which the orthonormal basis
        then holds to eps times their ratio only. It is sharpened once more in that case.
        """
        scale = self.normal.scale.unsqueeze(-1)
        self._nulls = _orthonormal(self._sharpened(self._nulls), nulls)
        Q, R = qr(self._nulls * scale)
        self.null = torch.where(nulls.unsqueeze(-2), Q, 0)
        length = R.diagonal(dim1=-2, dim2=-1).abs()
        shortest = torch.where(nulls, length, torch.inf).amin(-1)
        if bool((length.amax(-1) > _UNEVEN * shortest).any()):
            again = torch.where(scale > 0, self.null / scale, 0)
            size = column_norms(again).unsqueeze(-2)
            again = self._sharpened(again / torch.where(size > 0, size, 1))
            self.null = _orthonormal(again * size * scale, nulls)

    def _sharpened(self, V: Tensor) -> Tensor:
        """(I - B^+ B) V, without zero columns, which have a scale of their own."""
        B = self.normal.B
        V = V - refine(B, self._rough, B.mv(V), None, self.normal.eps)[0]
        return self._without_holes(V)

    def _rough(self, q: Tensor) -> Tensor:
        """P q with P near (B^H B)^+ in the scaled variables."""
        if self.small is None:
            return self.normal.solve(self._without_holes(q))
        V = self.small.V
        return self._fine(q) + V @ (self._weights.unsqueeze(-1) * (V.mH @ q))

    def _fine(self, q: Tensor) -> Tensor:
        """The shifted inverse on the row space."""
        q = self._without_holes(q)
        z = self.normal.solve(q - self._nulls @ (self._nulls.mH @ q))
        return z - self._nulls @ (self._nulls.mH @ z)

    def _without_holes(self, v: Tensor) -> Tensor:
        """v with zeros in the place of zero columns; v itself where there are none."""
        return torch.where(self.normal.zero.unsqueeze(-1), 0, v) if self.normal.holes else v

    def project(self, v: Tensor) -> Tensor:
        """Project onto the row space of B (unscaled variables)."""
        v = self._without_holes(v)
        if self.null is not None:
            for _ in range(2):  # v may be long beside what is left of it
                v = v - self.null @ (self.null.mH @ v)
        return v

    def solve(
        self, c: Tensor | None, g: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return x = G^+ (B^H c + g), status and corrections per column, B x - c if it came up."""
        scale = self.normal.scale.unsqueeze(-1)
        if g is not None:
            g = scale * self.project(g)
        B, goal = self.normal.B, self._goal
        x, status, steps, image = refine(B, self._rough, c, g, goal, self._known)
        x = self.project(scale * x)
        if self.null is not None:
            # a long part of x along the null vectors leaves its rounding behind, seen by B or not
            x = self.project(x + scale * self._rough(self._residual(x, c, g)[1]))
        if self._doubtful(steps):
            y, s = self._residual(x, c, g)
            status = self._judged(status, s, c, g, y, 2)
        return *self._checked(x, status, steps), image

    @functools.cached_property
    def _known(self) -> Foresight | None:
        """What a first correction may be left out by; None where nothing is known."""
        floor = None if self.small is not None else self._floor()
        if floor is None:
            return None
        return Foresight(floor, self.normal.eps, self._goal > _FULLY * self.normal.eps)

    def _floor(self) -> np.ndarray | None:
        """A lower bound of the singular values of B S, if one came up."""
        bound = self.normal.cond_bound
        if math.isfinite(bound):
            return np.asarray(math.sqrt(self.normal.n) / bound)
        found = self._bottom if self._first is None else self._first[1]
        if found is None:
            return None
        floor = found.to(torch.float64).cpu().numpy() / MARGIN
        return floor if self.normal.batch is None else floor[..., None]

    def _residual(self, x: Tensor, c: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor]:
        """x in the scaled variables, and B^H (c - B x) + g."""
        scale = self.normal.scale.unsqueeze(-1)
        y = torch.where(scale > 0, x / scale, 0)
        r = -self.normal.B.mv(y) if c is None else c - self.normal.B.mv(y)
        return y, self.normal.B.rmv(r) if g is None else self.normal.B.rmv(r) + g

    def _doubtful(self, steps: Tensor) -> bool:
        """Whether the corrections' own verdict is not enough: they see what P sees."""
        return self.small is not None or bool((steps > _QUICK).any())

    def _judged(
        self, status: Tensor, s: Tensor, c: Tensor | None, g: Tensor | None, v: Tensor, power: int
    ) -> Tensor:
        """Call inaccurate what does not solve the equations: power 2 for B^H B v, 1 for B^H v.

        The residual s = B^H c + g - (B^H B) v of a backward stable solve has the size
        eps |B| (|c| + |B| |v|) + eps |g|. A v that is wrong is large as a rule, and would excuse
        itself; so it counts only up to what the solution can be, |c| / sigma + |g| / sigma^2
        with the smallest singular value sigma on the rank. Null directions are left out of s:
        there it may be as large as the rank tolerance allows.
        """
        s = self._without_holes(s)
        if self.small is not None:
            s = s - self._nulls @ (self._nulls.mH @ s)
        top = self.top.unsqueeze(-1)
        bottom = top / (MARGIN * self.cond.unsqueeze(-1))
        zero = torch.zeros_like(top)
        cnorm = zero if c is None else column_norms(c)
        gnorm = zero if g is None else column_norms(g)
        most = cnorm / bottom + gnorm / bottom**power
        size = torch.fmin(column_norms(v), most)
        bound = self._tolerance * (top * cnorm + gnorm + top**power * size)
        wrong = column_norms(s) > bound
        return torch.where(wrong & (status == int(Status.DIRECT)), int(Status.INACCURATE), status)

    def _checked(self, x: Tensor, status: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        broken = self.normal.broken
        if bool(broken.any()):
            x = torch.where(broken[..., None, None], torch.nan, x)
            status = torch.where(broken[..., None], int(Status.NONFINITE), status)
        return x, status, steps

    def image(self, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return B G^+ g, status and corrections per column."""
        g = self.normal.scale.unsqueeze(-1) * self.project(g)
        fine = None if self.small is None else self._fine
        B, goal = self.normal.B, self._goal
        y, status, steps = refine_image(B, self._rough, fine, g, goal, self._known)
        if self._doubtful(steps):
            status = self._judged(status, g - self.normal.B.rmv(y), None, g, y, 1)
        return self._checked(y, status, steps)


def _orthonormal(V: Tensor, keep: Tensor) -> Tensor:
    """Orthonormalise the leading columns marked in ``keep``; the others are zero."""
    Q = qr(V)[0]
    return torch.where(keep.unsqueeze(-2), Q, 0)
