"""Dense singular value decomposition: every rank, minimum norm, batched, CPU and CUDA.

With B = U S V^H cut at the rank r,

    B^+ c = V S^-1 U^H c          (B^H B)^+ g = V S^-2 V^H g.

Damping enters as extra rows, B = [A; D], which makes the rank full where D > 0.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import RankWarning
from funclsq.methods._protocol import Options, Raw
from funclsq.operators import Operator, StackedOp
from funclsq.solution import Method, Status

__all__ = ["PreparedSVD", "default_rcond", "prepare"]


def default_rcond(m: int, n: int, dtype: torch.dtype) -> float:
    """Singular values below rcond times the largest count as zero: max(m, n) eps."""
    return max(m, n, 1) * torch.finfo(dtype).eps


def dense_stack(op: Operator, damp: Tensor | None) -> Tensor:
    """The dense matrix [A; D] of a sparse or dense operator."""
    whole: Any = op if damp is None else StackedOp(op, damp)
    if not hasattr(whole if damp is None else op, "dense"):
        raise ValueError(
            "solver: a dense method needs the entries of A, and a LinearOperator has none. "
            "Use solver='lsmr'."
        )
    return whole.dense()


def pad_rows(c: Tensor, m: int) -> Tensor:
    """[c; 0]: the right-hand side of a problem stacked with its damping rows."""
    if c.shape[-2] == m:
        return c
    return torch.cat((c, c.new_zeros((*c.shape[:-2], m - c.shape[-2], c.shape[-1]))), -2)


def direct_raw(x: Tensor) -> Raw:
    """A solve by factorisation, as a Raw."""
    lead = (*x.shape[:-2], x.shape[-1])
    if lead == (1,) and x.device.type == "cpu":
        return Raw(x, *_ONE)
    return Raw(x, *_direct(lead, x.device))


def _direct(lead: tuple[int, ...], device: Any = None) -> tuple[Tensor, Tensor]:
    """Status and iterations; whoever reads a Raw leaves them as they are."""
    status = torch.full(lead, int(Status.DIRECT), dtype=torch.int64, device=device)
    return status, torch.zeros(lead, dtype=torch.int64, device=device)


_ONE = _direct((1,))  # of one column on the CPU


class PreparedSVD:
    """U (..., m, p), s (..., p) and V (..., n, p) with s set to zero beyond the rank."""

    method = int(Method.svd)

    def __init__(self, U: Tensor, s: Tensor, V: Tensor, rank: Tensor, method: int) -> None:
        self.U, self.V = U, V
        index = torch.arange(s.shape[-1], device=s.device)
        keep = index < rank.unsqueeze(-1)
        self.inverse = torch.where(keep, 1 / torch.where(keep, s, 1), 0).to(s.dtype)
        self.rank = rank
        self.deficient = rank < V.shape[-2]
        low = torch.where(keep, s, torch.inf).amin(-1) if s.shape[-1] else rank
        high = s.amax(-1) if s.shape[-1] else rank
        self.cond = torch.where(rank > 0, high / low, torch.nan)
        self.method = method
        self.nbytes = sum(t.numel() * t.element_size() for t in (U, s, V))

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = V S^-1 (U^H c + S^-1 V^H g)."""
        inverse = self.inverse.unsqueeze(-1)
        total: Any = 0
        if c is not None:
            total = self.U.mH @ pad_rows(c, self.U.shape[-2])
        if g is not None:
            total = total + inverse * (self.V.mH @ g)
        return direct_raw(self.V @ (inverse * total))


def prepare(op: Operator, damp: Tensor | None, options: Options, full_rank: bool) -> PreparedSVD:
    """Factorise [A; D]; singular values up to rcond times the largest count as zero.

    ``options.rank`` as an int keeps that many singular values whatever their size.
    """
    prepared = of_matrix(dense_stack(op, damp), options, int(Method.svd))
    tell_false_claim(prepared.rank, min(prepared.U.shape[-2], op.shape[1]), options)
    return prepared


def tell_false_claim(rank: Tensor, full: int, options: Options) -> None:
    """Warn if rank="full" was asserted of a matrix that has a lower rank."""
    if options.rank == "full" and bool((rank < full).any()):
        tolerance = "" if options.rcond is None else f" at rcond={options.rcond:.1e}"
        warnings.warn(
            f"rank='full' was asserted, and A has numerical rank {int(rank.min())} of {full}"
            f"{tolerance}; the minimum-norm solution is returned, but derivatives rely on the "
            "assertion. Pass rank='auto'.",
            RankWarning,
            stacklevel=2,
        )


def of_matrix(A: Tensor, options: Options, method: int) -> PreparedSVD:
    """Prepare from a dense matrix (..., m, n)."""
    m, n = A.shape[-2:]
    if min(m, n) == 0:
        lead = A.shape[:-2]
        U, V = A.new_zeros((*lead, m, 0)), A.new_zeros((*lead, n, 0))
        s = A.new_zeros((*lead, 0)).abs()
    else:
        U, s, Vh = thin_svd(A)
        V = Vh.mH
    return PreparedSVD(U, s, V, count_rank(s, m, n, A.dtype, options), method)


def thin_svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V^H of each matrix; NaN for one that is not finite, where LAPACK would give up."""
    finite = torch.isfinite(A).all(-1).all(-1)
    whole = bool(finite.all())
    B = A if whole else torch.where(finite[..., None, None], A, 0)
    try:
        found = torch.linalg.svd(B, full_matrices=False)
    except torch.linalg.LinAlgError:
        if A.device.type != "cpu":
            raise
        found = None
    if found is None or not (A.device.type != "cpu" or bool(torch.isfinite(found[1]).all())):
        found = _patient_svd(B)  # NaN, or nothing, for subnormal numbers among ordinary ones
    if whole:
        return found
    U, s, Vh = (torch.where(_over(finite, t), t, torch.nan) for t in found)
    return U, s, Vh


def _over(flag: Tensor, t: Tensor) -> Tensor:
    return flag.reshape(*flag.shape, *(1 for _ in range(t.ndim - flag.ndim)))


def _patient_svd(A: Tensor) -> Any:
    """Where divide and conquer (gesdd) fails, QR iteration (gesvd) on what rounding leaves."""
    import scipy.linalg  # here, because it takes a while and is almost never needed

    top = A.abs().amax((-2, -1), keepdim=True)
    A = torch.where(A.abs() > torch.finfo(A.dtype).eps ** 3 * top, A, 0)
    found = [
        scipy.linalg.svd(one.numpy(), full_matrices=False, lapack_driver="gesvd")
        for one in A.reshape(-1, *A.shape[-2:])
    ]
    stacked = [torch.stack([torch.from_numpy(t) for t in part]) for part in zip(*found)]
    return [t.reshape(*A.shape[:-2], *t.shape[1:]) for t in stacked]


def count_rank(s: Tensor, m: int, n: int, dtype: torch.dtype, options: Options) -> Tensor:
    """Numerical rank from singular values in falling order."""
    if isinstance(options.rank, int):
        rank = min(options.rank, s.shape[-1])
        return torch.full(s.shape[:-1], rank, dtype=torch.int64, device=s.device)
    if s.shape[-1] == 0:
        return torch.zeros(s.shape[:-1], dtype=torch.int64, device=s.device)
    rcond = default_rcond(m, n, dtype) if options.rcond is None else options.rcond
    return (s > rcond * s[..., :1]).sum(-1)
