"""Values in the order of a pattern's entries, and in that of its canonical CSR form.

A user's entries may come in any order and repeat; products work on the CSR form. What is sampled at
the entries (an outer product, for a gradient) goes the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq import fused, spare
from funclsq.pattern import SparsityPattern
from funclsq.products import FEW_PARTS, csr_tensor, few_terms, sddmm_csr, sddmm_few

__all__ = ["csr_to_entries", "entries_to_csr", "sddmm"]


def entries_to_csr(pattern: SparsityPattern, values: Tensor) -> Tensor:
    """Bring values in entry order to canonical CSR order, repeated entries summed."""
    order = pattern.permutation("order", values.device)
    if order is not None:
        values = spare.taken(values, order)
    slot = pattern.permutation("slot", values.device)
    if slot is not None:
        out = values.new_zeros((*values.shape[:-1], pattern.nnz_unique))
        values = out.index_add_(-1, slot, values)
    return values


def csr_to_entries(pattern: SparsityPattern, csr_values: Tensor) -> Tensor:
    """Read CSR slots back in entry order (the adjoint of :func:`entries_to_csr`)."""
    index = pattern.permutation("inverse_order", csr_values.device)
    return csr_values if index is None else spare.taken(csr_values, index)


def sddmm(pattern: SparsityPattern, U: Tensor, V: Tensor, batched: bool) -> Tensor:
    """sum_k U[row, k] conj(V[col, k]) at each entry; summed over members unless ``batched``."""
    if U.ndim == 3 and not batched:
        U, V = (t.movedim(0, 1).flatten(1) for t in (U, V))
    on_cpu = U.device.type == "cpu"
    in_parts = on_cpu and U.dtype == torch.complex64 and U.shape[-1] <= FEW_PARTS
    dtype = torch.float32 if in_parts else U.dtype
    one_pass = fused.sampled(
        pattern.tensor("indptr", U.device), pattern.tensor("indices", U.device), U, V
    )
    if one_pass is not None:
        out = one_pass
    elif U.shape[-1] <= few_terms(U.dtype) and on_cpu:
        rows, cols = (pattern.tensor(name, U.device) for name in ("csr_rows", "indices"))
        out = sddmm_few(rows, cols, U, V)
    elif U.ndim == 2:
        out = sddmm_csr(_csr(pattern, dtype, U.device), U, V)
    else:
        count = U.shape[0]
        if count == 0:
            return U.new_zeros((0, pattern.nnz))
        whole = _csr(pattern.repeated(count), dtype, U.device)
        out = sddmm_csr(whole, U.flatten(0, 1), V.flatten(0, 1)).view(count, -1)
    return csr_to_entries(pattern, out)


def _csr(pattern: SparsityPattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The pattern as a CSR tensor of zeros (kept: MKL reads the values even at beta = 0)."""
    key = ("zeros", dtype, device)
    found = pattern.cache.get(key)
    if found is None:
        indptr, indices = pattern.tensor("indptr", device), pattern.tensor("indices", device)
        values = torch.zeros(pattern.nnz_unique, dtype=dtype, device=device)
        found = pattern.cache[key] = csr_tensor(indptr, indices, values, pattern.shape)
    return found
