"""Dense QR: the workhorse for small and dense problems, rank-revealing, batched, CPU and CUDA.

Tall B = Q R (with the damping rows stacked below A):

    B^+ c = R^-1 Q^H c          (B^H B)^-1 g = R^-1 R^-H g.

Wide B: B^H = Q R, so B^+ c = Q R^-H c and (B^H B)^+ g = Q R^-H R^-1 Q^H g.

Rank. The columns of R (its rows' duals for wide B) are first divided by their norms, so that a
mere difference of units is no rank deficiency; one shorter than rcond times the longest counts
as zero (``scale=True`` keeps it). ||R||_F ||R^-1||_F bounds the condition number from above;
where it stays below 1 / rcond the rank is full and the triangular solves are used.
Otherwise the singular values of the scaled R are counted, and the minimum-norm solution comes
from the SVD of R cut at that rank.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._protocol import Options, Raw
from funclsq.methods.svd import (
    PreparedSVD,
    count_rank,
    default_rcond,
    dense_stack,
    direct_raw,
    of_matrix,
    pad_rows,
    tell_false_claim,
    thin_svd,
)
from funclsq.operators import Operator
from funclsq.range import safe_norm
from funclsq.shapes import broadcast_shapes
from funclsq.solution import Method

__all__ = ["PreparedQR", "prepare"]

SMALL = 64  # columns of R up to which NumPy looks at it


class PreparedQR:
    """Q (..., p, q) and R (..., q, q) of B (tall) or of B^H (wide), of full rank."""

    method = int(Method.qr)

    def __init__(self, Q: Tensor, R: Tensor, wide: bool, rows: int, cond: Any) -> None:
        self.Q, self.R, self.wide, self.rows = Q, R, wide, rows
        q = R.shape[-1]
        self.rank: Any = q
        if isinstance(cond, Tensor):
            self.rank = torch.full(R.shape[:-2], q, dtype=torch.int64, device=R.device)
        self.deficient = wide
        self.cond = cond
        self.nbytes = sum(t.numel() * t.element_size() for t in (Q, R))

    def _down(self, v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.R.mH, v, upper=False)

    def _up(self, v: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.R, v, upper=True)

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = B^+ c + (B^H B)^+ g."""
        if c is not None:
            c = pad_rows(c, self.rows)
        if self.wide:
            total = None if g is None else self._up(self.Q.mH @ self._lead(g))
            if c is not None:
                total = c if total is None else total + c
            return direct_raw(self.Q @ self._down(self._lead(total)))
        total = None if g is None else self._down(self._lead(g))
        if c is not None:
            projected = self.Q.mH @ c
            total = projected if total is None else total + projected
        return direct_raw(self._up(self._lead(total)))

    def _lead(self, v: Tensor) -> Tensor:
        if v.ndim == 2 == self.R.ndim:
            return v
        lead = broadcast_shapes(v.shape[:-2], self.R.shape[:-2])
        return v.expand(*lead, *v.shape[-2:])


def prepare(
    op: Operator, damp: Tensor | None, options: Options, full_rank: bool
) -> PreparedQR | PreparedSVD:
    """Factorise [A; D] by QR, or by QR and an SVD of R where the rank is not full."""
    B = dense_stack(op, damp)
    m, n = B.shape[-2:]
    q = min(m, n)
    if q == 0:
        return of_matrix(B, options, int(Method.qr))
    wide = m < n
    rcond = default_rcond(m, n, B.dtype) if options.rcond is None else options.rcond
    Q, R = torch.linalg.qr(B.mH if wide else B)
    plain = None
    if R.ndim == 2 and R.device.type == "cpu" and q <= SMALL:
        plain = _plain_cond(R, 0.0 if options.scale is True else rcond)
        if plain is not None and plain * rcond < 1 and _all_asked(options, q):
            return PreparedQR(Q, R, wide, m, plain)
    if plain is None and not bool(torch.isfinite(R).all()):
        # LAPACK fails on numbers at the end of the range
        Q, R = torch.linalg.qr(_without_negligible(B.mH if wide else B, rcond))
    norms = safe_norm(R).unsqueeze(-2)
    floor = 0 if options.scale is True else rcond * norms.amax(-1, keepdim=True)
    scaled = torch.where(norms > floor, R / torch.where(norms > 0, norms, 1), 0)
    eye = torch.eye(q, dtype=R.dtype, device=R.device).expand_as(R)
    inverse = torch.linalg.solve_triangular(scaled, eye, upper=True)
    cond = torch.linalg.matrix_norm(scaled) * torch.linalg.matrix_norm(inverse)
    if _all_asked(options, q) and bool((cond * rcond < 1).all()):
        return PreparedQR(Q, R, wide, m, cond)
    rank = count_rank(_svdvals(scaled), m, n, B.dtype, options)
    if _all_asked(options, q) and bool((rank == q).all()):
        return PreparedQR(Q, R, wide, m, cond)
    tell_false_claim(rank, q, options)
    U, s, Vh = thin_svd(R)
    if wide:  # B = R^H Q^H = V S (Q U)^H
        return PreparedSVD(Vh.mH, s, Q @ U, rank, int(Method.qr))
    return PreparedSVD(Q @ U, s, Vh.mH, rank, int(Method.qr))


def _all_asked(options: Options, q: int) -> bool:
    """Whether no rank below the full one was asked for."""
    return not isinstance(options.rank, int) or options.rank >= q


def _plain_cond(R: Tensor, floor: float) -> float | None:
    """||R||_F ||R^-1||_F of one small R, columns scaled; None if a column is negligible or odd.

    By NumPy and Python, whose calls on few numbers cost a fraction of torch's.
    """
    r = R.numpy()
    squares = np.einsum("ij,ij->j", r, r.conj() if np.iscomplexobj(r) else r).real
    sizes = squares.tolist()
    low, high = min(sizes), max(sizes)
    far = 1e30 if r.dtype in (np.float32, np.complex64) else 1e280
    if not (math.isfinite(sum(sizes)) and high < far and low > max(1 / far, floor**2 * high)):
        return None
    scaled = torch.from_numpy(r / np.sqrt(squares))
    inverse = torch.linalg.solve_triangular(scaled, _eye(R.shape[-1], R.dtype), upper=True)
    cond = math.sqrt(len(sizes)) * torch.linalg.vector_norm(inverse).item()
    return cond if math.isfinite(cond) else None


@functools.lru_cache(maxsize=64)
def _eye(q: int, dtype: torch.dtype) -> Tensor:
    """The identity, not to be written to."""
    return torch.eye(q, dtype=dtype)


def _without_negligible(B: Tensor, rcond: float) -> Tensor:
    """B without columns that count as zero, and entries far below the rounding of their column."""
    norms = torch.linalg.vector_norm(B, dim=-2, keepdim=True)
    tiny = torch.finfo(B.dtype).eps ** 3
    counts = (norms > rcond * norms.amax(-1, keepdim=True)) & (B.abs() > tiny * norms)
    return torch.where(counts | ~torch.isfinite(norms), B, 0)


def _svdvals(R: Tensor) -> Tensor:
    finite = torch.isfinite(R).all(-1).all(-1)
    return torch.linalg.svdvals(torch.where(finite[..., None, None], R, 0))
