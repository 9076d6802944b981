"""Solve G x = B^H c + g to the accuracy of a QR factorisation, given a rough inverse of G = B^H B.

The residual r = c - B x is formed afresh from x in every step, and the correction comes from
q = B^H r + g: the corrected semi-normal equations. The fixed point has the error of a backward
stable method, eps cond (|x| + cond |r|), whatever the rough inverse P; P only sets the rate. Where
the rate is poor, each correction is found by a few conjugate-gradient steps preconditioned with P,
and the outer refinement keeps the accuracy that they alone would lose.

A right-hand side g asks for B x, not x, to be accurate (x has the error eps cond^2 there):
progress is then measured in |B dx| = <dx, q>^(1/2).

References
----------
A. Bjorck, Stability analysis of the method of seminormal equations for linear least squares
problems, Linear Algebra Appl. 88/89, 1987, doi:10.1016/0024-3795(87)90101-7.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funclsq.operators import Operator
from funclsq.solution import Status

__all__ = ["refine"]

_FAST = 0.3  # a contraction below this is left to plain refinement
_PLAIN = 12  # corrections at most
_INNER = 60  # conjugate-gradient steps within one correction
_DROP = 1e-3  # by which one correction's inner iteration reduces the error


def refine(
    B: Operator, rough: Callable[[Tensor], Tensor], c: Tensor | None, g: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x = (B^H B)^-1 (B^H c + g), status and corrections made per column.

    Parameters
    ----------
    B : Operator
        The column-scaled operator.
    rough : callable
        q -> P q with P near (B^H B)^-1, Hermitian positive.
    c, g : Tensor or None, (..., m, k) and (..., n, k)
        The right-hand sides.
    eps : float
        Unit roundoff to reach.
    """
    q = _normal_residual(B, None, c, g)
    x = rough(q)
    energy = g is not None
    size = _size(x, q, energy)
    if energy:
        whole = torch.linalg.vector_norm(B.mv(x), dim=-2)
    else:
        whole = size
    last, rate = size, torch.full_like(size, torch.inf)
    done = ~torch.isfinite(size) | (size == 0)
    best = torch.full_like(size, torch.inf)  # relative size of the smallest correction
    fast = torch.zeros_like(done)  # a good contraction was seen
    inner = torch.zeros_like(done)
    steps = torch.zeros_like(size, dtype=torch.int64)
    for step in range(_PLAIN):
        if bool(done.all()):
            break
        q = _normal_residual(B, x, c, g)
        use_inner = bool((inner & ~done).any())
        dx = _conjugate_gradients(B, rough, q) if use_inner else rough(q)
        now = _size(dx, q, energy)
        rate = now / last
        if not energy:
            whole = torch.linalg.vector_norm(x, dim=-2)
        relative = torch.where(whole > 0, now / whole, now)
        good = rate < _FAST
        fast |= good
        # A correction that has stopped falling after fast ones is rounding: leave it.
        floor = ~(rate < 0.7) & fast
        take = ~done & ~floor & torch.isfinite(now)
        x = torch.where(take.unsqueeze(-2), x + dx, x)
        steps = torch.where(take, step + 1, steps)
        best = torch.where(done, best, torch.minimum(best, relative))
        done |= floor | ~torch.isfinite(now)
        done |= good & (relative * rate <= 0.25 * eps)
        inner |= ~good & ~done
        last = torch.where(take, now, last)
    status = torch.full_like(steps, int(Status.INACCURATE))
    status[fast & (best < 1e-3)] = int(Status.DIRECT)
    status[size == 0] = int(Status.DIRECT)
    finite = torch.isfinite(x).all(-2)
    status[~finite] = int(Status.NONFINITE)
    return x, status, steps


def _normal_residual(B, x, c, g):
    """B^H (c - B x) + g."""
    if x is None:
        q = None if c is None else B.rmv(c)
    else:
        Bx = B.mv(x)
        q = B.rmv(torch.neg(Bx) if c is None else c - Bx)
    if g is None:
        return q
    return g if q is None else q + g


def _size(dx: Tensor, q: Tensor, energy: bool) -> Tensor:
    if energy:
        return (dx.conj() * q).sum(-2).real.clamp(min=0).sqrt()
    return torch.linalg.vector_norm(dx, dim=-2)


def _conjugate_gradients(B, rough, q: Tensor) -> Tensor:
    """Reduce the energy error of G dx = q by _DROP, preconditioned, all columns at once."""
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
