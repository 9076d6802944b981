"""torch's sparse layouts as pattern plus values, and back, differentiable both ways.

torch.func cannot hold sparse tensors, so they are a thin face: the values go to the primitive,
and a gradient comes back as a sparse tensor of the same layout with the same indices.
"""

from __future__ import annotations

import collections
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq.beneath import outside_transforms
from funclsq.function import Function
from funclsq.pattern import SparsityPattern

__all__ = ["assemble", "is_sparse", "pattern_and_values"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_BLOCKED = (torch.sparse_bsr, torch.sparse_bsc)
_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_recent: collections.deque[SparsityPattern] = collections.deque(maxlen=16)
_lock = threading.Lock()


def is_sparse(A: Any) -> bool:
    """Whether A is a torch tensor of a sparse layout."""
    return isinstance(A, Tensor) and A.layout != torch.strided


def pattern_and_values(A: Tensor) -> tuple[SparsityPattern, Tensor]:
    """Split a sparse tensor; the pattern is shared by all tensors with equal indices.

    A torch.func transform can hold no sparse tensor, so A is a constant of every active one: it
    is split outside them.
    """
    with outside_transforms():
        row, col, shape = _indices(A)
        return _intern(row, col, shape), _Values.apply(A)


def assemble(pattern: SparsityPattern, values: Tensor, layout: torch.layout) -> Tensor:
    """Make a torch sparse tensor from pattern and values (repeated entries are summed)."""
    if values.ndim != 1:
        raise ValueError(
            f"Sparse.to_torch: a batch cannot be one sparse tensor; got values of shape "
            f"{tuple(values.shape)}. Convert the members."
        )
    index = torch.from_numpy(np.stack((pattern.row, pattern.col)).astype(np.int64))
    index = index.to(values.device)
    coo = _FromValues.apply(values, (torch.sparse_coo, (index,), pattern.shape, values.shape))
    if layout == torch.sparse_coo:
        return coo
    if layout not in (torch.sparse_csr, torch.sparse_csc):
        raise ValueError(
            f"Sparse.to_torch: layout must be sparse_coo, sparse_csr, sparse_csc or strided; got "
            f"{layout}. Block layouts need a block size: call .to_sparse_bsr() on the result."
        )
    return coo.coalesce().to_sparse(layout=layout)


def _intern(row: np.ndarray, col: np.ndarray, shape: tuple[int, int]) -> SparsityPattern:
    with _lock:
        known = list(_recent)
    for pattern in reversed(known):
        if (
            pattern.shape == shape
            and pattern.nnz == row.size
            and np.array_equal(pattern.row, row)
            and np.array_equal(pattern.col, col)
        ):
            return pattern
    pattern = SparsityPattern(row, col, shape)
    with _lock:
        _recent.append(pattern)
    return pattern


def _indices(A: Tensor) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Row and column of each stored value, in the order of the flattened values."""
    A = A.detach()
    if A.ndim != 2:
        raise ValueError(
            f"funclsq: a sparse tensor must be a matrix (m, n); got shape {tuple(A.shape)}. For a "
            "batch with one pattern pass funclsq.Sparse(pattern, values) with values (B, nnz)."
        )
    m, n = A.shape
    if A.layout == torch.sparse_coo:
        if A.sparse_dim() != 2:
            raise ValueError(
                f"funclsq: a COO tensor needs 2 sparse dimensions; got {A.sparse_dim()}. Make it "
                "with .to_sparse(sparse_dim=2)."
            )
        row, col = A._indices().cpu().numpy()
        return row, col, (m, n)
    if A.layout not in _COMPRESSED:
        raise TypeError(f"funclsq: cannot take a tensor of layout {A.layout}.")
    by_row = A.layout in _BY_ROW
    starts = (A.crow_indices() if by_row else A.ccol_indices()).cpu().numpy()
    minor = (A.col_indices() if by_row else A.row_indices()).cpu().numpy()
    major = np.repeat(np.arange(starts.size - 1), np.diff(starts))
    row, col = (major, minor) if by_row else (minor, major)
    if A.layout in _BLOCKED:
        height, width = A.values().shape[-2:]
        row = row[:, None, None] * height + np.arange(height)[None, :, None]
        col = col[:, None, None] * width + np.arange(width)[None, None, :]
        row, col = (t.reshape(-1) for t in np.broadcast_arrays(row, col))
    return row, col, (m, n)


def _skeleton(A: Tensor) -> tuple[Any, ...]:
    """What is needed to build a tensor like A from other values."""
    if A.layout == torch.sparse_coo:
        return A.layout, (A._indices(),), tuple(A.shape), tuple(A._values().shape)
    if A.layout in _BY_ROW:
        index = (A.crow_indices(), A.col_indices())
    else:
        index = (A.ccol_indices(), A.row_indices())
    return A.layout, index, tuple(A.shape), tuple(A.values().shape)


def _build(values: Tensor, skeleton: tuple[Any, ...]) -> Tensor:
    layout, index, shape, value_shape = skeleton
    values = values.reshape(value_shape)
    if layout == torch.sparse_coo:
        return torch.sparse_coo_tensor(index[0], values, shape, check_invariants=False)
    return torch.sparse_compressed_tensor(
        index[0], index[1], values, shape, layout=layout, check_invariants=False
    )


def _flat_values(A: Tensor) -> Tensor:
    values = A._values() if A.layout == torch.sparse_coo else A.values()
    return values.reshape(-1).clone()


class _Values(Function):
    """The stored values of a sparse tensor, flattened; uncoalesced entries each their own."""

    @staticmethod
    def forward(A):
        return _flat_values(A.detach())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.skeleton = _skeleton(inputs[0].detach())

    @staticmethod
    def backward(ctx, values_bar):
        return _FromValues.apply(values_bar, ctx.skeleton)


class _FromValues(Function):
    """A sparse tensor from its flattened values."""

    @staticmethod
    def forward(values, skeleton):
        return _build(values.detach().clone(), skeleton)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.skeleton = inputs[1]

    @staticmethod
    def backward(ctx, A_bar):
        return _Gather.apply(A_bar, ctx.skeleton), None


class _Gather(Function):
    """The entries of any matrix at the positions of a skeleton, flattened."""

    @staticmethod
    def forward(A, skeleton):
        A = A.detach()
        if A.layout == skeleton[0] and A.layout != torch.strided:
            mine = _skeleton(A)
            if mine[3] == skeleton[3] and all(map(torch.equal, mine[1], skeleton[1])):
                return _flat_values(A)
        template = _build(torch.zeros(skeleton[3], dtype=A.dtype, device=A.device), skeleton)
        row, col, (_, n) = _indices(template)
        if A.layout == torch.strided:
            return A[torch.from_numpy(row).to(A.device), torch.from_numpy(col).to(A.device)]
        return _lookup(A, row, col, n)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.skeleton = inputs[1]

    @staticmethod
    def backward(ctx, values_bar):
        return _FromValues.apply(values_bar, ctx.skeleton), None


def _lookup(A: Tensor, row: np.ndarray, col: np.ndarray, n: int) -> Tensor:
    """Entries of a sparse A at given positions, zero where it stores none."""
    coo = A.to_sparse(layout=torch.sparse_coo).coalesce()
    have_row, have_col = coo.indices().cpu().numpy()
    have, want = have_row.astype(np.int64) * n + have_col, row.astype(np.int64) * n + col
    at = np.searchsorted(have, want)
    found = at < have.size
    found[found] = have[at[found]] == want[found]
    out = torch.zeros(want.size, dtype=A.dtype, device=A.device)
    place = torch.from_numpy(np.flatnonzero(found)).to(A.device)
    out[place] = coo.values()[torch.from_numpy(at[found]).to(A.device)]
    return out
