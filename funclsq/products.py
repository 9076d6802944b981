"""Raw sparse products: CSR times a block of columns, and the sampled outer product (SDDMM).

Kernels on plain tensors; nothing here is recorded by autograd or seen by torch.func.
"""

from __future__ import annotations

import threading
import warnings

import torch
from torch import Tensor

from funclsq import spare

__all__ = [
    "FEW_PARTS",
    "FEW_SINGLE",
    "FEW_TERMS",
    "csr_mm",
    "csr_tensor",
    "few_terms",
    "sddmm_csr",
    "sddmm_few",
]

LARGE = 1 << 20  # bytes of a result from which on memory that was used before is looked for
FEW_TERMS = 4  # columns up to which gathering them one by one is 2 to 3 times faster
FEW_SINGLE = 2  # the same in float32
FEW_PARTS = 16  # columns up to which complex64 is faster as its real and imaginary parts
WIDTH = 8  # columns below which torch's sampled product is slow in float32: up to 14 times
_lock = threading.Lock()
_announced = False


def csr_tensor(indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Wrap CSR arrays (trusted: made by a SparsityPattern) as a torch tensor, without a copy."""
    global _announced
    if not _announced:  # torch says once per process that CSR is in beta
        with _lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            out = torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)
            _announced = True
            return out
    return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)


def csr_mm(matrix: Tensor, X: Tensor, out: Tensor | None = None) -> Tensor:
    """Y = A X for CSR A (m, n) and X (n, k).

    A large result lies in memory that was used before: with fresh memory a product of 20,000 x
    2,000 and 64 columns takes 23 ms, of which 17 are the system's for handing it out. All columns
    go at once: by 8, 16 or 32 at a time, which fit the cache better, it takes 1.0 to 3 times as
    long, and up to 5 times in complex numbers (16 to 200 columns, 160,000 to 10,000,000 entries).

    Cost: 2 nnz k flops.
    """
    (m, _), k = matrix.shape, X.shape[1]
    if matrix._nnz() == 0 or k == 0 or m == 0:
        return X.new_zeros((m, k)) if out is None else out.zero_()
    if out is None and m * k * X.element_size() >= LARGE:
        out = _room((m, k), X)
    if k == 1:  # a true matrix-vector product is up to 1.9 times faster than addmm
        if out is None:
            return torch.mv(matrix, X.squeeze(1)).unsqueeze(1)
        torch.mv(matrix, X.squeeze(1), out=out.squeeze(1))
        return out
    if out is None:
        return torch.mm(matrix, X)
    return torch.addmm(out, matrix, X, beta=0, out=out)


def _room(shape: tuple[int, ...], X: Tensor) -> Tensor:
    """Memory like that of X, not filled; used before, on the CPU."""
    if X.device.type == "cpu":
        return spare.empty(shape, X.dtype)
    return X.new_empty(shape)


def few_terms(dtype: torch.dtype) -> int:
    """Columns up to which ``sddmm_few`` is faster than ``sddmm_csr``."""
    return FEW_SINGLE if dtype == torch.float32 else FEW_TERMS


def sddmm_csr(matrix: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Entries of U V^H at the stored positions of a CSR matrix: sum_k U[i, k] conj(V[j, k]).

    U and V may be complex64 where the matrix is float32: real and imaginary parts are taken one
    after the other, in 0.3 to 0.7 of the time for up to 16 columns (torch takes 27 ns for an entry
    of any type but float32 before it reads a number, and 3 ns there).
    Memory: nothing of size nnz x k is made. Cost: 2 nnz k flops.
    """
    if matrix._nnz() == 0 or U.shape[1] == 0:
        return U.new_zeros(matrix._nnz())
    if U.is_complex() and not matrix.is_complex():
        # of columns (Re u, Im u) and (Re v, Im v): u conj(v) = u . v + i (-i u) . v
        u, turned, v = (torch.view_as_real(t.resolve_conj()).flatten(1) for t in (U, -1j * U, V))
        return torch.complex(sddmm_csr(matrix, u, v), sddmm_csr(matrix, turned, v))
    if U.dtype == torch.float32 and U.shape[1] < WIDTH and not U.is_cuda:
        U, V = (torch.nn.functional.pad(t, (0, WIDTH - t.shape[1])) for t in (U, V))
    Vh = V.conj().resolve_conj() if V.is_complex() else V
    # detached: a view of a CSR tensor has no .real
    out = torch.sparse.sampled_addmm(matrix, U.contiguous(), Vh.contiguous().T, beta=0.0)
    return out.values().detach()


def sddmm_few(rows: Tensor, cols: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The same for few columns, entry e at (rows[e], cols[e]): gathered, multiplied, added up.

    U and V may be batches, (b, m, k) and (b, n, k).
    Memory: two vectors of nnz entries besides the result.
    """
    out = None
    for u, v in zip(U.unbind(-1), V.unbind(-1)):
        part = spare.taken(u.contiguous(), rows)
        part *= spare.taken(v.conj().resolve_conj().contiguous(), cols)
        out = part if out is None else out.add_(part)
    return U.new_zeros((*U.shape[:-2], rows.shape[0])) if out is None else out
