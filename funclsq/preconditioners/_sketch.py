"""Sketch and precondition: the R of a random projection of the rows of A.

S has d = c n rows and in each of its m columns q entries +-q^(-1/2), one in each of q groups of
d / q rows (a sparse sign embedding). With high probability ||S A x|| = (1 +- eta) ||A x|| for all
x, eta about c^(-1/2). So for S A = Q R the condition number of A R^-1 is at most
(1 + eta) / (1 - eta), whatever that of A. Damping needs no sketch: its n rows are kept.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.operators import SparseOp
from funclsq.preconditioners._intake import take_in, untracked
from funclsq.preconditioners._preconditioner import Preconditioner

__all__ = ["sketch"]

_NAME = "sketch"


@untracked()
def sketch(
    A: Any,
    *,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
    oversampling: int = 4,
    nnz_per_row: int = 8,
    seed: int = 0,
) -> Preconditioner:
    """N = R^H R for the QR factorisation of [S W^(1/2) A; D], S a random sparse embedding.

    For very tall A (m of at least some tens of n, n up to a few thousand), ill-conditioned or not:
    the number of iterations depends neither on A nor on its condition number.

    Parameters
    ----------
    A : Tensor, scipy.sparse matrix or Sparse, shape (m, n)
        As for :func:`funclsq.lstsq`, without batch dimensions. Its values are taken as they are:
        no gradient flows through a preconditioner.
    damp : float or real Tensor, scalar or (n,), units of A
        D, as in the solve.
    weights : real Tensor, shape (m,), optional
        W, as in the solve.
    oversampling : int
        c: rows of S per column of A, at least 2. More rows take longer to factor and save
        iterations: the error falls by about c^(1/2) in each.
    nnz_per_row : int
        q: entries of S for each row of A.
    seed : int
        Of the random signs and places. The same seed gives the same S, everywhere.

    Returns
    -------
    Preconditioner
        Where A has no more rows than S would have, R is that of A itself. Where R is singular to
        rounding, 16 n eps (columns scaled to norm one, eps of float64) is added as damping.

    Raises
    ------
    TypeError, ValueError
        As :func:`funclsq.lstsq`; if ``oversampling`` < 2, ``nnz_per_row`` < 1 or ``seed`` < 0; for
        a LinearOperator, a batch, and anything not on the CPU.

    Notes
    -----
    Cost: q passes over the entries of A, 2 c n^3 flops for the QR factorisation in float64, c n^2
    numbers on the way and n^2 kept; an application is two dense triangular solves.

    References
    ----------
    V. Rokhlin and M. Tygert, Proc. Natl. Acad. Sci. USA 105 (2008) 13212-13217,
    doi:10.1073/pnas.0804869105.
    M. Meier, Y. Nakatsukasa, A. Townsend and M. Webb, SIAM J. Matrix Anal. Appl. 45 (2024)
    905-929, doi:10.1137/23M1551973.
    E. N. Epperly, SIAM J. Matrix Anal. Appl. 45 (2024) 1782-1804, doi:10.1137/23M1616790.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> t = torch.linspace(0, 1, 400, dtype=torch.float64)
    >>> A = t[:, None] ** torch.arange(8)
    >>> P = fl.preconditioners.sketch(A)
    >>> P
    sketch(shape=(400, 8), rows=32, dtype=torch.float64)
    >>> sol = fl.solve(A, A.sum(1), solver="lsqr", rank="full", preconditioner=P)
    >>> sol.x.round(decimals=6)
    tensor([1., 1., 1., 1., 1., 1., 1., 1.], dtype=torch.float64)
    """
    for what, value, least in (
        ("oversampling", oversampling, 2),
        ("nnz_per_row", nnz_per_row, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(
                f"{_NAME}: {what} must be an int >= {least}; got {value!r}. Leave it out for the "
                "default."
            )
    given = take_in(_NAME, A, damp, weights)
    m, n = given.shape
    each = -(-oversampling * n // nnz_per_row)  # rows of S in each of its groups
    rows = each * nnz_per_row
    if m <= rows or n == 0:
        Y, rows = given.B.dense(), m
    else:
        Y = _embedded(given.B, each, nnz_per_row, np.random.default_rng(seed))
    R = _triangular(Y, given.d2)
    R = (R / given.scale).to(given.dtype).contiguous()
    return Preconditioner(given.shape, given.dtype, _NAME, f"rows={rows}", _Triangular(R))


@dataclasses.dataclass(frozen=True, eq=False)
class _Triangular:
    """N^-1 = R^-1 R^-H for a dense R."""

    R: Tensor

    @property
    def nbytes(self) -> int:
        return self.R.nbytes

    def apply(self, v: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.R.mH, v, upper=False)
        return torch.linalg.solve_triangular(self.R, half, upper=True)


def _embedded(B: Any, each: int, groups: int, random: np.random.Generator) -> Tensor:
    """S B, (groups * each, n): every row of B is added to or taken from one row of each group."""
    m, n = B.shape
    parts = []
    for _ in range(groups):
        place = torch.from_numpy(random.integers(0, each, m))
        sign = torch.from_numpy(random.integers(0, 2, m) * (2.0 / groups**0.5) - groups**-0.5)
        if isinstance(B, SparseOp):
            row = torch.from_numpy(B.pattern.csr_rows)
            at = place[row].mul_(n).add_(torch.from_numpy(B.pattern.indices.copy()))
            part = B.csr_values.new_zeros(each * n).index_add_(0, at, B.csr_values * sign[row])
            parts.append(part.view(each, n))
        else:
            part = B.A.new_zeros((each, n)).index_add_(0, place, B.A * sign.unsqueeze(-1))
            parts.append(part)
    return torch.cat(parts)


def _triangular(Y: Tensor, d2: Tensor) -> Tensor:
    """R of [Y; d], square and regular; the columns of [Y; d] have norms of about one."""
    n = Y.shape[1]
    R = torch.linalg.qr(Y, mode="r").R
    tiny = 16 * n * torch.finfo(R.dtype).eps
    singular = R.shape[0] < n or bool((R.diagonal().abs() <= tiny).any())
    if singular or bool((d2 > 0).any()):
        d = (d2 + tiny**2).sqrt() if singular else d2.sqrt()
        R = torch.linalg.qr(torch.cat((R, torch.diag(d).to(R.dtype))), mode="r").R
    return R
