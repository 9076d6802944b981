"""The directions in which B is small: condition number, rank, null space.

Subspace iteration with a (shifted) factor of N = B^H B + s I, in the form
V <- V - N^-1 B^H (B V), which is s N^-1 V: as B V is formed afresh, what is left of the other
directions falls to rounding, which s N^-1 V itself would not reach. Singular values by
Rayleigh-Ritz on B V, so with an error of eps |B| and not of eps^(1/2) |B|.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Small", "glimpse", "largest", "qr", "small_directions", "smallest"]

_FIRST = 8  # directions sought at least
_STEPS = 12  # iterations at most with one block


class Small(NamedTuple):
    """Right singular directions of B with small singular values, ascending.

    ``V`` is (..., n, p), ``sigma`` (..., p); ``next`` (...) estimates the singular value after
    them (from above), inf where none is left or known; ``complete`` says whether all below the
    limit were found.
    """

    V: Tensor
    sigma: Tensor
    next: Tensor
    complete: bool


def _random(normal, k: int, seed: int = 0) -> Tensor:
    lead = () if normal.batch is None else (normal.batch,)
    draw = torch.Generator().manual_seed(seed)
    # normally distributed numbers take three times as long, and serve no better
    V = torch.rand((normal.n, k), generator=draw, dtype=torch.float64).sub_(0.5)
    return V.to(normal.B.device, normal.B.dtype).expand(*lead, normal.n, k)


def _unit(V: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(V, dim=-2, keepdim=True)
    return V / torch.where(norms > 0, norms, 1)


def largest(normal, steps: int = 5) -> Tensor:
    """Estimate the largest singular value of B from below by power iteration, () or (b,)."""
    v = torch.where(normal.zero.unsqueeze(-1), 0, _random(normal, 1, seed=1))
    for _ in range(steps):  # columns have norms of about one: v grows by n at most
        v = normal.B.rmv(normal.B.mv(v))
    return torch.linalg.vector_norm(normal.filled.mv(_unit(v)), dim=-2).squeeze(-1)


def glimpse(normal) -> tuple[Tensor, Tensor]:
    """One step of inverse iteration: its vector v, and the estimate that it gives, () or (b,).

    With v = N^-1 u that is |B v| / |v| = (<u, v> / <v, v>)^(1/2), and takes no product with B.
    """
    u = _random(normal, 1)
    v = normal.solve(u)
    up, down = (torch.linalg.vecdot(t, v, dim=-2).real.squeeze(-1) for t in (u, v))
    return v, torch.where(up > 0, up / down, 0).sqrt()


def smallest(normal, v: Tensor, steps: int = 1) -> Tensor:
    """Estimate the smallest singular value of B from above by inverse iteration, () or (b,).

    ``v`` is the vector of a first step, from a random start with components xi along the singular
    vectors. After p steps in all the square of the estimate is

        sum xi^2 sigma^(2 - 4 p) / sum xi^2 sigma^(-4 p),

    at its worst where all other sigma are R^(1 / 4 p) times the smallest, R = sum xi^2 over the
    smallest's own: it is 2^(-1/2) R^(1 / 4 p) times too large then. For R = 1e8 that is 70 after
    one step and 7 after two.
    """
    for _ in range(steps):  # N is positive definite in its rounding: v grows by 1/eps or so
        v = normal.solve(v)
    return torch.linalg.vector_norm(normal.filled.mv(_unit(v)), dim=-2).squeeze(-1)


def small_directions(normal, limit: Tensor, floor: Tensor, most: int) -> Small:
    """Find all right singular directions of B with singular value below ``limit``, () or (b,).

    ``normal`` holds the factor of N = B^H B + s I with s below limit^2. The block grows until a
    singular value beyond the limit is met in every member, or to ``most`` directions; it is
    iterated until those below the limit stand to a tenth (or to ``floor``).
    """
    B = normal.filled
    signs = _random(normal, min(_FIRST, most), seed=2).sgn()
    V = normal.solve(signs)
    # Hutchinson: the trace of s (B^H B + s)^-1 counts the singular values below s^(1/2)
    count = normal.shift * (signs.conj() * V).sum((-2, -1)).real.max() / max(1, V.shape[-1])
    p = min(most, int(1.2 * count + 3 * count.clamp(min=0) ** 0.5) + _FIRST)
    extra = normal.solve(_random(normal, p - V.shape[-1], seed=3))
    V = qr(torch.cat((V, extra), -1))[0]
    while True:
        sigma = torch.full_like(limit, torch.inf).unsqueeze(-1)
        for _ in range(_STEPS):
            before = sigma
            V = qr(V - normal.solve(B.rmv(B.mv(V))))[0]
            V, sigma = _ritz(B, V)
            moved = (before - sigma).abs() > 0.1 * sigma + floor.unsqueeze(-1)
            if not bool((moved & (sigma <= limit.unsqueeze(-1))).any()):
                break
        if bool((sigma[..., -1] > limit).all()) or p >= most:
            break
        grown = min(2 * p, most)
        if grown == normal.n:
            p = grown
            whole = torch.eye(p, dtype=V.dtype, device=V.device).expand(*V.shape[:-1], p)
            V, sigma = _ritz(B, whole)
            break
        extra = normal.solve(_random(normal, grown - p, seed=3 + grown))
        V = qr(torch.cat((V, extra), -1))[0]
        p = grown
    low = sigma <= limit.unsqueeze(-1)
    keep = int(low.sum(-1).max()) if p else 0
    after = torch.where(low, torch.inf, sigma).amin(-1) if p else torch.full_like(limit, torch.inf)
    return Small(V[..., :keep], sigma[..., :keep], after, keep < p or p == normal.n)


def qr(V: Tensor, mode: str = "reduced") -> tuple[Tensor, Tensor]:
    """QR of a block of vectors, or of their images under B, as torch gives it.

    LAPACK's reflections make NaN of subnormal numbers. B has columns of norm about one, so that
    no image is right to better than eps, and an entry of eps^3 is as good as zero; of vectors
    longer than one, the entries are judged beside the largest.
    """
    Q, R = torch.linalg.qr(V, mode=mode)
    if not bool(torch.isfinite(R).all() & torch.isfinite(Q).all()):
        size = V.abs()
        top = size.flatten(-2).amax(-1).clamp(min=1)[..., None, None]
        floor = torch.finfo(V.dtype).eps ** 3 * top
        Q, R = torch.linalg.qr(torch.where(size < floor, 0, V), mode=mode)
    return Q, R


def _ritz(B, V: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate V to Ritz vectors of B, singular values ascending."""
    R = qr(B.mv(V), "r")[1]
    _, sigma, Wh = torch.linalg.svd(R, full_matrices=False)
    return V @ Wh.flip(-2).mH, sigma.flip(-1)
