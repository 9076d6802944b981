"""Least squares refined with residuals in twice the working precision.

x = G^+ (A^H W c + g) solves, with its residual s,

    s + A x = c,      A^H W s - D2 x = -g,

and one step of refinement takes the residuals f, h of these two equations, exact but for one
rounding, and adds dx = G^+ (A^H W f + h), ds = f - A dx. Refining s as well as x is what makes the
limit independent of cond(A)^2 ||s|| (Bjorck 1967). The solution of the problem as stored is
reached to rounding while eps cond(A) is well below 1.

Exact products and sums are those of Dekker and Knuth, in plain tensor operations.

References
----------
A. Bjorck, BIT 7 (1967) 257-278, doi:10.1007/BF01939321.
T. Ogita, S. M. Rump and S. Oishi, SIAM J. Sci. Comput. 26 (2005) 1955-1988,
doi:10.1137/030601818.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from funclsq import derivatives
from funclsq.matrix import matmul

__all__ = ["accurate_sum", "refinement", "two_product"]

_STEPS = 3


def two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return (p, e) with p = fl(a b) and p + e = a b exactly (real; no overflow)."""
    p = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    return p, a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)


def _split(a: Tensor) -> tuple[Tensor, Tensor]:
    bits = {torch.float64: 27, torch.float32: 12}[a.dtype]
    t = (2.0**bits + 1) * a
    high = t - (t - a)
    return high, a - high


def accurate_sum(terms: Tensor, errors: Tensor) -> Tensor:
    """Sum terms + errors over the last dimension as if in twice the precision."""
    total = errors.sum(-1)
    while terms.shape[-1] > 1:
        if terms.shape[-1] % 2:
            terms = torch.cat((terms, torch.zeros_like(terms[..., :1])), -1)
        a, b = terms[..., ::2], terms[..., 1::2]
        terms = a + b
        t = terms - a
        total = total + ((a - (terms - t)) + (b - t)).sum(-1)
    return terms[..., 0] + total


def _combination(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum of all products a * b over the last dimension, over all parts."""
    p, e = zip(*(two_product(*torch.broadcast_tensors(a, b)) for a, b in parts))
    return accurate_sum(torch.cat(p, -1), torch.cat(e, -1))


def _first(c: Tensor, s: Tensor, A: Tensor, x: Tensor) -> Tensor:
    """f = c - s - A x, for one column of each: (..., m)."""
    one = torch.ones_like(c[..., :1, None])
    return _combination([(c[..., None], one), (-s[..., None], one), (-A, x[..., None, :])])


def _second(
    g: Tensor, A: Tensor, w: Tensor | None, s: Tensor, d2: Tensor | None, x: Tensor
) -> Tensor:
    """h = g + A^T W s - D2 x, for one column of each: (..., n)."""
    At = A.mT
    one = torch.ones_like(g[..., :1, None])
    parts = [(g[..., None], one)]
    if w is None:
        parts.append((At, s[..., None, :]))
    else:
        high, low = two_product(*torch.broadcast_tensors(w, s))
        parts += [(At, high[..., None, :]), (At, low[..., None, :])]
    if d2 is not None:
        parts.append((-d2[..., None], x[..., None]))
    return _combination(parts)


def refinement(p: Any, x: Tensor, c: Tensor | None, g: Tensor | None) -> Tensor:
    """What is missing in x = G^+ (A^H W c + g), as a constant to be added to it.

    Parameters
    ----------
    p : Problem
        Of a dense real matrix.
    x : Tensor, shape (n, k) or (B, n, k)
        The solution found by ``derivatives.solve``.
    c : Tensor, shape (m, k) or (B, m, k), or None
        Right-hand side in the range.
    g : Tensor, shape (n, k) or (B, n, k), or None
        Right-hand side in the domain.

    Returns
    -------
    Tensor, shape as x
        No derivative flows through it: that of x itself is right to working precision. Cost: 3
        solves with the factor at hand, and 60 m n k flops.
    """
    with torch.no_grad(), fwAD._set_fwd_grad_enabled(False):
        (A,) = p.params
        c = torch.zeros_like(A[..., :1]) if c is None else c
        g = torch.zeros_like(x) if g is None else g
        start, s = x, c - matmul(p.plan.structure, p.params, x)
        c = c.expand(s.shape)
        g = g.expand(x.shape)
        for _ in range(_STEPS):
            columns = range(x.shape[-1])
            f = torch.stack([_first(c[..., j], s[..., j], A, x[..., j]) for j in columns], -1)
            h = torch.stack(
                [_second(g[..., j], A, p.w, s[..., j], p.d2, x[..., j]) for j in columns], -1
            )
            dx, ds, _ = derivatives.solve(p.plan, p.w, p.d2, f, h, None, p.params)
            x = x + dx
            s = s - ds
        return x - start
