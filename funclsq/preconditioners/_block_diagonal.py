"""Block Jacobi: the diagonal blocks of A^H W A + D^2, all of them inverted at once.

A column order that brings each block together cuts every row of A into pieces, one per block that
it meets. With each piece as a row of its own, A-hat, the blocks come from one sparse product that
never forms the rest: A-hat^H A-hat is block diagonal, and its blocks are those of A^H A.

Each block is L L^H, and its N^-1 = L^-H L^-1 = K^H K for K = L^-1. All the K together are one
block-triangular sparse matrix, so that N^-1 is applied by two sparse products: no loop over the
blocks, no gathering, and positive definite whatever the rounding of K.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq.entries import entries_to_csr
from funclsq.operators import SparseOp
from funclsq.pattern import SparsityPattern
from funclsq.preconditioners._intake import take_in, untracked
from funclsq.preconditioners._preconditioner import Preconditioner

__all__ = ["block_diagonal"]

_NAME = "block_diagonal"


@untracked()
def block_diagonal(
    A: Any,
    blocks: Any,
    *,
    damp: float | Tensor = 0.0,
    weights: Tensor | None = None,
) -> Preconditioner:
    """N = the diagonal blocks of A^H W A + D^2, zero elsewhere (block Jacobi).

    For unknowns that come in groups (the pose of a camera, the coordinates of a point, the
    levels of a factor) and are strongly coupled within them. It repairs any scaling or near
    dependence inside a block, and leaves the coupling between blocks to the iteration.

    Parameters
    ----------
    A : Tensor, scipy.sparse matrix or Sparse, shape (m, n)
        As for :func:`funclsq.lstsq`, without batch dimensions. Its values are taken as they are:
        no gradient flows through a preconditioner.
    blocks : int, or integer array of shape (n,)
        Columns per block, consecutive ones (the last block may be shorter); or a label for each
        column, equal labels making a block.
    damp : float or real Tensor, scalar or (n,), units of A
        D, as in the solve.
    weights : real Tensor, shape (m,), optional
        W, as in the solve.

    Returns
    -------
    Preconditioner
        Each block, its columns scaled to norm one, has 16 s eps on its diagonal (s its order, eps
        of float64): nothing beside a regular block, and it makes a singular one regular.

    Raises
    ------
    TypeError, ValueError
        As :func:`funclsq.lstsq`; if ``blocks`` is neither a positive int nor n integers; for a
        LinearOperator, a batch, and anything not on the CPU.

    Notes
    -----
    Cost: one pass over the pairs of entries that meet in a row and a block, and s^3 flops per
    block; s (s + 1) / 2 numbers kept per block, read twice per application. On a float32 A all is
    worked out in float64 and kept in float32.

    References
    ----------
    Y. Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., SIAM (2003), section 10.7,
    doi:10.1137/1.9780898718003.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> A = torch.tensor([[1.0, 1, 0], [1, 2, 0], [0, 0, 3]], dtype=torch.float64)
    >>> P = fl.preconditioners.block_diagonal(A, [0, 0, 1])
    >>> P
    block_diagonal(shape=(3, 3), blocks=2, dtype=torch.float64)
    >>> b = torch.tensor([2.0, 3.0, 3.0], dtype=torch.float64)
    >>> x = fl.lstsq(A, b, solver="lsmr", rank="full", preconditioner=P)
    >>> x.round(decimals=9)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    given = take_in(_NAME, A, damp, weights)
    n = given.shape[1]
    label = _labels(blocks, n)
    columns = _columns(label)
    make = _from_sparse if isinstance(given.B, SparseOp) else _from_dense
    rows, cols, values = [], [], []
    for group, N in zip(columns, make(given.B, columns)):
        N.diagonal(dim1=-2, dim2=-1).add_(given.d2[torch.from_numpy(group)])
        K = _inverse_factor(N)
        i, j = np.tril_indices(group.shape[1])
        rows.append(group[:, i].reshape(-1))
        cols.append(group[:, j].reshape(-1))
        values.append(K[:, torch.from_numpy(i), torch.from_numpy(j)].reshape(-1))
    row, col = (np.concatenate(x) if x else np.empty(0, np.int64) for x in (rows, cols))
    pattern = SparsityPattern(row, col, (n, n))
    K = torch.cat(values) if values else given.scale.new_zeros(0)
    K = (K * given.scale[torch.from_numpy(col)]).to(given.dtype)
    inverse = _Product(pattern, entries_to_csr(pattern, K))
    count = sum(len(group) for group in columns)
    return Preconditioner(given.shape, given.dtype, _NAME, f"blocks={count}", inverse)


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """N^-1 = K^H K for a sparse K."""

    pattern: SparsityPattern
    values: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        return _Product, (self.pattern, self.values)

    @functools.cached_property
    def _K(self) -> SparseOp:
        return SparseOp(self.pattern, self.values)

    @property
    def nbytes(self) -> int:
        return 2 * (self.values.nbytes + self.pattern.indices.nbytes + self.pattern.indptr.nbytes)

    def apply(self, v: Tensor) -> Tensor:
        return self._K.rmv(self._K.mv(v))


def _labels(blocks: Any, n: int) -> np.ndarray:
    """Number the blocks: the block of each column."""
    needed = (
        f"{_NAME}: blocks must be a positive int, the columns per block, or {n} integers, the "
        "label of each column of A; got "
    )
    if isinstance(blocks, (int, np.integer)) and not isinstance(blocks, bool):
        if blocks < 1:
            raise ValueError(f"{needed}{blocks}.")
        return np.arange(n) // int(blocks)
    label = np.asarray(blocks.cpu() if isinstance(blocks, Tensor) else blocks)
    if label.size == 0:
        label = label.astype(np.int64)
    if label.dtype.kind not in "iu":
        raise TypeError(f"{needed}{type(blocks).__name__} of {label.dtype}.")
    if label.shape != (n,):
        raise ValueError(f"{needed}shape {label.shape}.")
    return np.unique(label, return_inverse=True)[1]


def _columns(label: np.ndarray) -> list[np.ndarray]:
    """Columns of the blocks of each order s, (count, s), the orders rising."""
    order_of = np.bincount(label)
    order = np.lexsort((label, order_of[label]))
    out, start = [], 0
    for s, count in zip(*np.unique(order_of, return_counts=True)):
        out.append(order[start : start + s * count].reshape(count, s))
        start += s * count
    return out


def _from_sparse(B: Any, columns: list[np.ndarray]) -> list[Tensor]:
    """The diagonal blocks of B^H B by one sparse product, (count, s, s) for each order s."""
    n = B.shape[1]
    order = np.concatenate([c.reshape(-1) for c in columns]) if columns else np.arange(0)
    place = np.empty(n, dtype=B.pattern.indices.dtype)
    place[order] = np.arange(n)
    sizes = np.concatenate([np.full(len(c), c.shape[1]) for c in columns] or [np.arange(0)])
    block = np.repeat(np.arange(sizes.size), sizes)  # of each column in the new order
    first = np.cumsum(sizes) - sizes
    data = B.csr_values.numpy()
    csr = scipy.sparse.csr_array((data, place[B.pattern.indices], B.pattern.indptr), shape=B.shape)
    csr.sort_indices()
    piece = block[csr.indices]
    new = np.ones(piece.size, dtype=bool)
    new[1:] = piece[1:] != piece[:-1]
    starts = csr.indptr[:-1]
    new[starts[starts < piece.size]] = True
    cuts = np.append(np.flatnonzero(new), piece.size)
    pieces = scipy.sparse.csr_array((csr.data, csr.indices, cuts), shape=(cuts.size - 1, n))
    N = (pieces.conj().T.tocsr() @ pieces).tocoo()
    at = block[N.row]
    flat = (np.cumsum(sizes**2) - sizes**2)[at]
    flat += (N.row - first[at]) * sizes[at] + N.col - first[at]
    entries = np.zeros(int((sizes**2).sum()), dtype=data.dtype)
    entries[flat] = N.data
    parts = torch.from_numpy(entries).split([c.size * c.shape[1] for c in columns])
    return [part.view(len(c), c.shape[1], c.shape[1]) for part, c in zip(parts, columns)]


def _from_dense(B: Any, columns: list[np.ndarray]) -> list[Tensor]:
    """The diagonal blocks of B^H B by batched products, (count, s, s) for each order s."""
    out = []
    for group in columns:
        part = B.A[:, torch.from_numpy(group)].movedim(0, -2)  # (count, m, s)
        out.append(part.mH @ part)
    return out


def _inverse_factor(N: Tensor) -> Tensor:
    """L^-1 of N + shift = L L^H, N (count, s, s) of unit diagonal and positive semidefinite.

    The shift is far above the rounding of N where its columns are not very long, and raised
    where it was not enough. N + s I is diagonally dominant, so that this ends.
    """
    s = N.shape[-1]
    eye = torch.eye(s, dtype=N.dtype)
    shift = torch.full((len(N), 1, 1), 16 * s * torch.finfo(N.dtype).eps, dtype=torch.float64)
    while True:
        L, info = torch.linalg.cholesky_ex(N + shift * eye)
        failed = info != 0
        if not bool(failed.any()):
            return torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
        shift = torch.where(failed[:, None, None], 16 * shift, shift)
