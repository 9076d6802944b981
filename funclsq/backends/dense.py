"""Dense Cholesky, one matrix or a batch, for normal matrices that are full or small.

Also in the place of a sparse backend, for a pattern whose factor would be nearly full: a sparse
factorisation then does the work of a dense one, in small pieces and with index lists. Measured on
one thread, factor and six solves, against rslab: 1.4 to 2.1 times faster on random patterns of 80
to 2000 columns whose factors fill 59 to 100% of the triangle, 1.3 to 1.5 times slower at 47%.

In single precision a large factor takes half the time and memory. With its unit roundoff eps,

    L L^H = N + E,  |E| <= c n eps |N|,  so that |I - (L L^H)^-1 N| <= c n eps cond(N),

which is the rate at which refinement in double precision contracts with it: of use where N is well
conditioned, and for nothing but a preconditioner.

References
----------
J. Langou et al., Exploiting the performance of 32 bit floating point arithmetic in obtaining 64 bit
accuracy, SC 2006, doi:10.1145/1188455.1188573.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from funclsq import spare
from funclsq.backends.registry import NotPositive
from funclsq.norms import column_sizes

__all__ = ["FACTORS", "NAME", "NEARLY_FULL", "SINGLE_ORDER", "Symbolic", "factor"]

NAME = "dense"
SINGLE_ORDER = 512  # from which a factor in single precision saves more than it costs
NEARLY_FULL = 0.6  # of the triangle, from which a factor is cheaper dense


class _Factor:
    single = False

    def __init__(self, L: Tensor) -> None:
        self._L = L
        self.nbytes = L.numel() * L.element_size()

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for blocks of columns, (..., n, k)."""
        # torch.cholesky_solve copies L first: it takes 3 times as long at n = 712, 15 at 3000
        y = torch.linalg.solve_triangular(self._L, rhs, upper=False)
        return torch.linalg.solve_triangular(self._L.mH, y, upper=True)

    def positive(self) -> bool:
        """Always: another matrix was refused."""
        return True


class _Single(_Factor):
    """A factor in single precision of a matrix in double precision, whose blocks it takes."""

    single = True

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for blocks of columns, (..., n, k), of any size."""
        size = column_sizes(rhs)
        if _moderate(size.numpy()):
            return super().solve(rhs.to(self._L.dtype)).to(rhs.dtype)
        # columns of size about one, which neither overflow nor vanish in single precision; by
        # powers of two, so that no column is rounded otherwise because of another one
        exponent = torch.frexp(torch.where((size > 0) & (size < torch.inf), size, 1))[1]
        unit = torch.ldexp(torch.ones_like(size), exponent.clamp(-1000, 1000)).unsqueeze(-2)
        return super().solve((rhs / unit).to(self._L.dtype)).to(rhs.dtype).mul_(unit)


def _moderate(size: np.ndarray) -> bool:
    """Whether single precision has room for columns of this size, and for what is solved of them.

    The largest entry of a column; what is below its 1e-18th part may vanish.
    """
    return bool(((size < 1e20) & ((size > 1e-20) | (size == 0))).all())


_SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}


def factor(N: Tensor, single: bool = False, in_place: bool = False) -> _Factor:
    """Factor N, (..., n, n), whose lower triangle is read, quickest if stored by columns.

    With ``single`` in single precision, if N is positive definite there. With ``in_place`` N, which
    must be stored by columns, is lost: half the time for 1,000 matrices of 50 x 50.

    Raises
    ------
    NotPositive
        If any member has a pivot that is not positive.
    """
    if single:
        L = _room(N, _SINGLE[N.dtype]).copy_(N)
        with contextlib.suppress(NotPositive):
            return _factor(L, L)
    return _factor(N, N if in_place else _room(N, N.dtype))


def _room(N: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a factor, by columns as LAPACK wants it; used before, on the CPU."""
    if N.device.type == "cpu":
        return spare.empty(N.shape, dtype).mT
    return torch.empty(N.shape, dtype=dtype, device=N.device).mT


def _factor(N: Tensor, L: Tensor) -> _Factor:
    """Factor N into L, stored by columns as LAPACK wants it; both may be one."""
    info = torch.empty(N.shape[:-2], dtype=torch.int32, device=N.device)
    L, _ = torch.linalg.cholesky_ex(N, out=(L, info))
    if bool((info != 0).any()):
        raise NotPositive("a pivot is not positive")
    return _Factor(L) if L.dtype in _SINGLE else _Single(L)


class Symbolic:
    """In the place of a sparse analysis: factors the same values, of one matrix or of a batch.

    Parameters
    ----------
    indptr, indices : array
        Full sorted CSC pattern of one matrix.
    batch : int or None
        Number of matrices whose values come together.
    """

    def __init__(self, indptr: np.ndarray, indices: np.ndarray, batch: int | None = None) -> None:
        n = self._n = indptr.size - 1
        self._batch = batch
        column = np.repeat(np.arange(n, dtype=np.int64), np.diff(indptr))
        self._lower = np.flatnonzero(indices >= column)  # of each column: the part that is read
        self._place = column[self._lower] * n + indices[self._lower]  # by columns, as LAPACK has it
        self.work = (n * (n + 1) / 2, n**3 / 3)

    def factor(self, data: np.ndarray, single: bool = False) -> _Flat:
        """Factor values, those of one matrix after those of the other; as :func:`factor`."""
        lead = () if self._batch is None else (self._batch,)
        data = data.reshape(*lead, -1)
        double = torch.complex128 if np.iscomplexobj(data) else torch.float64
        shape = (*lead, self._n, -1)
        if single:
            with contextlib.suppress(NotPositive):
                return _Flat(self._factored(data, lead, _SINGLE[double]), shape)
        return _Flat(self._factored(data, lead, double), shape)

    def _factored(self, data: np.ndarray, lead: tuple[int, ...], dtype: torch.dtype) -> _Factor:
        N = spare.empty((*lead, self._n**2), dtype).zero_()
        N.numpy()[..., self._place] = data[..., self._lower]
        N = N.view(*lead, self._n, self._n).mT
        return _factor(N, N)


class _Flat:
    """A dense factor that takes and gives blocks of columns as sparse ones do."""

    def __init__(self, inner: _Factor, shape: tuple[int, ...]) -> None:
        self._inner, self._shape, self.nbytes = inner, shape, inner.nbytes
        self.single = inner.single

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve for a block of columns, (n, k), or (b n, k) for a batch."""
        q = torch.from_numpy(np.ascontiguousarray(rhs)).view(*self._shape[:-1], rhs.shape[1])
        return self._inner.solve(q).reshape(rhs.shape).numpy()

    def positive(self) -> bool:
        """Always: another matrix was refused."""
        return True


FACTORS = (_Factor, _Flat)
