"""Solve G x = B^H c + g to the accuracy of a QR factorisation, given a rough inverse of G = B^H B.

The residual r = c - B x is formed afresh from x in every step, and the correction comes from
q = B^H r + g: the corrected semi-normal equations. The fixed point has the error of a backward
stable method, eps cond (|x| + cond |r|), whatever the rough inverse P; P only sets the rate. Where
the rate is poor, each correction is found by a few conjugate-gradient steps preconditioned with P,
and the outer refinement keeps the accuracy that they alone would lose.

A right-hand side g asks for B x to be accurate (x itself has the error eps cond^2 there), so
progress is measured in |B dx| = <dx, q>^(1/2) as well.

The first correction need not be made where it can be seen that it is not needed (_needless.py).

References
----------
A. Bjorck, Stability analysis of the method of seminormal equations for linear least squares
problems, Linear Algebra Appl. 88/89, 1987, doi:10.1016/0024-3795(87)90101-7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.extent import finite
from funclsq.methods._needless import Foresight, norms
from funclsq.operators import Operator
from funclsq.passes import flat
from funclsq.solution import Status

__all__ = ["refine", "refine_image"]

_FAST = 0.3  # a contraction below this is left to plain refinement
_SLOW = 0.7  # after fast ones, a contraction above this is rounding
_STEPS = 14  # corrections at most
_INNER = 60  # conjugate-gradient steps within one correction
_DROP = 1e-3  # by which one correction's inner iteration reduces the error
_SURE = 1e-3  # a last correction below this, relative to x, is accepted

Rough = Callable[[Tensor], Tensor]


def refine(
    B: Operator,
    rough: Rough,
    c: Tensor | None,
    g: Tensor | None,
    goal: float,
    known: Foresight | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return x = (B^H B)^-1 (B^H c + g), status and corrections made per column, and B x - c.

    The last is None unless it came up: where x is what the residual was taken of.

    Parameters
    ----------
    B : Operator
        The column-scaled operator.
    rough : callable
        q -> P q with P near (B^H B)^-1, Hermitian positive.
    c, g : Tensor or None, (..., m, k) and (..., n, k)
        The right-hand sides.
    goal : float
        Relative size of the first correction that is not made: the unit roundoff, or more.
    known : Foresight or None
        What the first correction may be left out by.
    """
    r: Tensor | None = None  # its memory is used again: that of new blocks costs as much as B x
    whole: np.ndarray | None = None
    passes = _passes(B, c, g)

    def residual(x: Tensor | None) -> Tensor:
        nonlocal r, whole
        if x is None:
            q = None if c is None else B.rmv(c)
        elif passes is not None:
            # r = B x - c,  q = g - B^H r
            if r is None:
                r = x.new_empty((B.shape[0], 1))
            if c is not None:
                r.copy_(c)
            q = torch.zeros_like(x)
            square = passes.through(flat(x), 0.0 if c is None else 1.0, flat(r), flat(q))
            whole = None if g is None else np.sqrt([square])
            return q.neg_() if g is None else torch.sub(g, q, out=q)
        else:
            r = B.mv(x, out=r)
            whole = None if g is None else norms(r)
            if c is None:
                q = B.rmv(r)
                return torch.sub(g, q, out=q)
            q = B.rmv(torch.sub(c, r, out=r))
        if g is None:
            return q
        return g.clone() if q is None else q.add_(g)

    def size(_: Tensor) -> np.ndarray | None:
        return whole

    def step(x: Tensor, dx: Tensor) -> Tensor:
        return x + dx

    kind = "g" if c is None else "c"
    x, status, steps = _iterate(B, rough, residual, step, lambda dx: dx, size, goal, kind, known)
    if r is None or bool(steps.any()):
        return x, status, steps, None
    return x, status, steps, r if passes is not None or c is None else r.neg_()


def _passes(B: Operator, c: Tensor | None, g: Tensor | None) -> Any:
    """The operator's passes of one column; None where products are to be used."""
    passes = getattr(B, "passes", None)
    if passes is None or (c is not None and g is not None):  # |B x| is not seen on the way
        return None
    rhs = g if c is None else c
    return passes() if rhs is not None and rhs.shape == (rhs.numel(), 1) else None


def refine_image(
    B: Operator,
    rough: Rough,
    fine: Rough | None,
    g: Tensor,
    goal: float,
    known: Foresight | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = B (B^H B)^-1 g, the least vector with B^H y = g, status and corrections.

    It is y that is accumulated, so that B^H y = g holds to eps |B| |y|, and not to the
    rounding of B z, which is cond times larger. For the same reason a step in the directions in
    which B is small, part of ``rough``, is followed by one without them, ``fine``: it corrects
    what the rounding of the former left in y.
    """

    def residual(y: Tensor | None) -> Tensor:
        return g.clone() if y is None else g - B.rmv(y)

    def step(y: Tensor, dz: Tensor) -> Tensor:
        y = y + B.mv(dz)
        return y if fine is None else y + B.mv(fine(residual(y)))

    return _iterate(
        B,
        rough,
        residual,
        step,
        lambda dz: step(torch.zeros((), dtype=dz.dtype), dz),
        norms,
        goal,
        "image",
        known,
    )


@np.errstate(all="ignore")  # ratios of corrections that are none, or leave the range
def _iterate(B, rough, residual, step, start, energy, goal, kind, known=None):
    """Refine until the corrections stop falling, per column; what decides that is NumPy's.

    ``energy`` gives |B x| of the x whose residual was taken last, None where it does not count.
    ``kind`` is that of ``Foresight.needless``.
    """
    image = kind == "image"
    q = residual(None)
    dx = rough(q)
    x = start(dx)
    begun = dx, q
    plain = norms(q if image else dx)
    power = _power(*begun) if image else None
    first = power if image else plain
    aim = plain
    done = ~np.isfinite(first) | (first == 0)
    fast = np.zeros_like(done)  # a good contraction was seen
    inner = np.zeros_like(done)
    best = np.full_like(first, np.inf)  # relative size of the smallest correction
    steps = np.zeros(first.shape, dtype=np.int64)
    left_out = np.zeros_like(done)
    for number in range(1, _STEPS + 1):
        if done.all():
            break
        q = residual(x)
        if number == 1 and known is not None:
            whole = energy(x) if known.loose else None
            left_out = ~done & known.needless(q, plain, whole, goal, kind)
            done |= left_out
            if done.all():
                break
        if power is None:
            power = _power(*begun)
        dx = _conjugate_gradients(B, rough, q) if (inner & ~done).any() else rough(q)
        new_plain, new_power = norms(q if image else dx), _power(dx, q)
        if number == 1 and known is not None and kind == "c":
            known.see(q, new_power)
        seen = []
        whole = energy(x)
        if whole is not None:
            seen.append((new_power / power, new_power / whole))
        seen.append((new_plain / plain, new_plain / (aim if image or number == 1 else norms(x))))
        rate, relative = seen[0]
        fast |= rate < _FAST
        # after fast ones, a correction that has stopped falling is rounding: leave it
        still = np.any([r < _SLOW for r, _ in seen], axis=0) | ~fast
        take = ~done & still & np.isfinite(new_plain)
        if take.any():
            new = step(x, dx)
            x = new if take.all() else torch.where(_like(take, x).unsqueeze(-2), new, x)
        steps[take] = number
        best = np.where(done, best, np.fmin(best, relative))
        # what the next correction would bring, by the rates seen
        enough = np.all(
            [((r < _FAST) & (size * r <= 0.25 * goal)) | ~(r < _SLOW) for r, size in seen], axis=0
        )
        done |= ~take | (enough & (fast | (relative == 0)))
        inner |= (rate > _FAST) & ~done
        plain = np.where(take, new_plain, plain)
        power = np.where(take, new_power, power)
    accepted = (fast & (best < _SURE)) | (best == 0) | (first == 0) | left_out
    status = np.where(accepted, np.int64(Status.DIRECT), np.int64(Status.INACCURATE))
    if not (left_out.all() or finite(x)):  # the norm of one that has no correction is finite
        status[~torch.isfinite(x).all(-2).cpu().numpy()] = int(Status.NONFINITE)
    return x, _like(status, x), _like(steps, x)


def _like(numbers: np.ndarray, x: Tensor) -> Tensor:
    """Numbers of each column, where x lies."""
    return torch.from_numpy(numbers).to(x.device)


def _power(dx: Tensor, q: Tensor) -> np.ndarray:
    """|B dx| where dx = (B^H B)^-1 q."""
    if dx.shape == (dx.numel(), 1):  # one column: in the order of memory, half the time
        dot = torch.vdot(dx.squeeze(1), q.squeeze(1)).unsqueeze(0)
    else:
        dot = torch.linalg.vecdot(dx, q, dim=-2)
    return np.sqrt(np.maximum(dot.real.cpu().numpy(), 0))


def _conjugate_gradients(B: Operator, rough: Rough, q: Tensor) -> Tensor:
    """Reduce the energy error of B^H B dx = q by _DROP, preconditioned, all columns at once."""
    x = torch.zeros_like(q)
    z = rough(q)
    p = z
    rho = (z.conj() * q).sum(-2).real
    target = rho * _DROP**2
    live = rho > 0
    for _ in range(_INNER):
        w = B.mv(p)
        bend = (w.conj() * w).sum(-2).real
        live = live & (bend > 0) & torch.isfinite(bend) & (rho > target)
        if not bool(live.any()):
            break
        alpha = torch.where(live, rho / bend, 0.0).unsqueeze(-2)
        x = x + alpha * p
        q = q - alpha * B.rmv(w)
        z = rough(q)
        new = (z.conj() * q).sum(-2).real
        live = live & (new > 0)
        beta = torch.where(live, new / rho, 0.0).unsqueeze(-2)
        rho = torch.where(live, new, rho)
        p = torch.where(live.unsqueeze(-2), z + beta * p, p)
    return x
