"""Little damping beside a null space: digits of s = A x - c that are lost, and got back.

With D^2 small and A wide, x = G^-1 (A^H W c + g), G = A^H W A + D^2, is fine as a method gives it,
but s = A x - c is not. For c alone it is as small as damp^2 |c| / |A|^2, a difference of what is
much larger. For g alone, which is what derivatives ask for, the part of g in the null space of A
makes x as large as |g| / damp^2 while s = A x has no part of it: the rounding of that part,
eps |A| |x|, is what s is left with. Derivatives are made of s, and lose eps (|A| / damp)^2.

So x and s are refined together, as unknowns of their own, on the equation that holds both,

    q = g - A^H W s - D^2 x,    dx = G^-1 q,    x <- x + dx,    s <- s + A dx.

It is the rounding of s that q shows, and q has no large null part: with e the error of s, and x
exact, q = -A^H W e and A dx = -e + damp^2 (A A^H W + damp^2)^-1 e. What remains is
eps |A| |g| / sigma^2 for the smallest singular value sigma of A: no loss, where A has full row
rank. Where it has not, the part of e beyond the range of A stays, as large as what a rounding of
the entries of A does to s: the problem itself is so sensitive. A warning tells how large that is.
For m >= n that is so wherever there is a null space: only what would be warned of is refined.
(Without damping the rules of differentiation project instead of dividing, and lose nothing.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import AccuracyWarning
from funclsq.norms import column_norms
from funclsq.range import within

__all__ = ["recovered"]

_PART = 0.01  # of g, which D^2 x is at least where a null space shows
_LOST = 64.0  # units of rounding that s may lack
_SURPLUS = 0.01  # of what may be lost, to which a correction is solved
_STEPS = 4  # refinements at most; each leaves the square of what was lost, or 1e-3 of it


def recovered(
    plan: Any,
    entry: Any,
    w: Tensor | None,
    d2: Tensor,
    c: Tensor | None,
    g: Tensor | None,
    x: Tensor,
    s: Tensor,
    inverse: Callable[[Any, Tensor | None, Tensor, float], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Refine x and s in the columns where s has lost digits, and warn of what stays lost.

    Parameters
    ----------
    plan, entry : Plan and Entry
        Settings; A as an operator, and the method prepared for it.
    w, d2, c, g : Tensor or None
        The problem, as of ``raw_solve``.
    x, s : Tensor, (..., n, k) and (..., m, k)
        What a method gave, and A x - c.
    inverse : callable
        (entry, w, q, relative tolerance) -> G^-1 q and A G^-1 q.
    """
    op, D2 = entry.op, d2.unsqueeze(-1)
    given = 0.0 if g is None else column_norms(g).double()
    found = None
    if c is None:  # a large x comes from a null space, or from small singular values alone
        if d2.shape[-1] == 1:
            found = column_norms(x)
            suspect = d2 * found > _PART * given
        else:
            suspect = column_norms(D2 * x) > _PART * given
        if not bool(suspect.any()):
            return x, s
    elif op.shape[0] >= op.shape[1]:
        return x, s
    root = None if w is None else w.sqrt().unsqueeze(-1)
    eps = torch.finfo(d2.dtype).eps

    def length(s: Tensor) -> Tensor:
        return column_norms(s if root is None else root * s).double()

    def back(s: Tensor) -> Tensor:
        return op.rmv(s if root is None else root * (root * s))

    def lost(size: Tensor) -> Tensor:
        """The part of s that rounding takes; it grows with the size of A."""
        return eps * size * xnorm / (snorm + given / size)

    xnorm = (column_norms(x) if found is None else found).double()
    snorm = length(s)
    wanted = max(eps, plan.options.atol or 0.0, plan.options.btol or 0.0)
    most = _LOST * wanted if op.shape[0] < op.shape[1] else max(eps**0.5, wanted)
    if entry.size is None:
        if entry.bound is None:
            entry.bound = _bound(op, root)
        if entry.bound is not None and bool((lost(entry.bound) <= most).all()):
            return x, s
        entry.size = _size(op, root)
    size = entry.size

    def least(s: Tensor) -> Tensor:
        return length(s) + given / size

    share = lost(size).nan_to_num(0.0, posinf=0.0)
    if c is None:
        share = torch.where(suspect, share, 0.0)
    lossy = share > most
    if not bool(lossy.any()):
        return x, s
    change, chosen = share, lossy.unsqueeze(-2)
    for _ in range(_STEPS):
        q = -back(s) - D2 * x
        tolerance = min(max(_SURPLUS * _LOST * eps / float(change.amax()), eps), _SURPLUS)
        dx, ds = inverse(entry, w, q if g is None else q + g, tolerance)
        x, s = torch.where(chosen, x + dx, x), torch.where(chosen, s + ds, s)
        change = torch.where(lossy, (length(ds) / least(s)).nan_to_num(0.0, posinf=0.0), 0.0)
        if not bool((change > max(eps**0.5, wanted)).any()):
            break
    if c is None and plan.on_failure == "warn" and bool((share > eps**0.5).any()):
        beyond = s - inverse(entry, w, back(s), eps)[1]
        beyond = beyond - inverse(entry, w, back(beyond), eps)[1]  # (damp / sigma)^4 of the range
        left = torch.maximum(change, torch.where(lossy, length(beyond) / least(s), 0.0))
        _warn(float(left.nan_to_num(0.0).amax()), g)
    return x, s


def _warn(worst: float, g: Tensor | None) -> None:
    """Say that more than half of the digits are lost, if they are."""
    assert g is not None
    if worst > torch.finfo(g.dtype).eps ** 0.5:
        warnings.warn(
            f"lstsq: derivatives are right to about {worst:.0e} only: damp is small, and the rows "
            "of A are dependent to rounding, so that they are divided by damp^2. Pass damp=0, "
            "whose derivatives are not, or a larger damp"
            f"{', or compute_dtype=torch.float64' if g.dtype == torch.float32 else ''}.",
            AccuracyWarning,
            stacklevel=2,
        )


def _bound(op: Any, root: Tensor | None) -> Tensor | None:
    """No less than ``_size``, by one pass over the entries; None where it takes more."""
    values = getattr(op, "csr_values", None)
    if values is None or values.numel() == 0:
        return None
    bound = torch.linalg.vector_norm(values, dim=-1, keepdim=True).double()
    if not within((float(bound.amin()), float(bound.amax())), values.dtype):
        return None  # squares may have left the range
    return bound if root is None else bound * root.squeeze(-1).amax(-1, keepdim=True).double()


def _size(op: Any, root: Tensor | None) -> Tensor:
    """About the size of W^(1/2) A, (1,) or (B, 1): its longest column, or two power steps."""
    B = op if root is None else op.scaled(row=root.squeeze(-1))
    norms = B.column_norms()
    if norms is not None:
        return norms.amax(-1, keepdim=True).double()
    generator = torch.Generator().manual_seed(0)
    v = torch.randn((op.shape[1], 1), generator=generator, dtype=torch.float64)
    v = v.to(device=op.device, dtype=op.dtype)
    v = v if op.batch is None else v.expand(op.batch, *v.shape)
    for _ in range(2):
        u = B.mv(v / column_norms(v).clamp(min=1e-300).unsqueeze(-2))
        v = B.rmv(u / column_norms(u).clamp(min=1e-300).unsqueeze(-2))
    return column_norms(v).double()
