"""A sparse matrix as static pattern plus differentiable values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq.matrix import matmul
from funclsq.operators import SparseStructure
from funclsq.pattern import SparsityPattern
from funclsq.shapes import broadcast_shapes
from funclsq.torch_sparse import assemble, pattern_and_values

__all__ = ["Sparse"]


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """The (m, n) matrix, or batch of matrices, with these values at a pattern's entries.

    A pytree in torch and JAX: the values are a leaf, the pattern is static. So it passes
    through ``grad``, ``vmap`` and ``jit`` where a torch sparse tensor cannot.

    Parameters
    ----------
    pattern : SparsityPattern
        Where the entries are.
    values : array, shape (..., nnz)
        One value per entry, in the pattern's order; leading dimensions are a batch.

    Raises
    ------
    TypeError
        If pattern is not a SparsityPattern.
    ValueError
        If the last dimension of values is not nnz.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> S = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    >>> A = fl.Sparse(S, torch.tensor([2.0, 1.0, 1.0]))
    >>> fl.lstsq(A, torch.tensor([2.0, 1.0, 3.0]))
    tensor([1., 2.])
    """

    pattern: SparsityPattern
    values: Any

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, SparsityPattern):
            raise TypeError(
                f"Sparse: pattern must be a SparsityPattern; got {type(self.pattern).__name__}."
            )
        shape = getattr(self.values, "shape", None)
        if shape is not None and (len(shape) == 0 or shape[-1] != self.pattern.nnz):
            raise ValueError(
                f"Sparse: values must have shape (..., {self.pattern.nnz}), one per stored entry; "
                f"got {tuple(shape)}."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n)."""
        return (*self.values.shape[:-1], *self.pattern.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    def __repr__(self) -> str:
        return f"Sparse(shape={self.shape}, nnz={self.pattern.nnz}, dtype={self.dtype})"

    @classmethod
    def from_torch(cls, A: Tensor) -> Sparse:
        """Split a torch tensor, sparse in any layout or strided, into pattern and values.

        Differentiable: gradients flow back to A in A's own layout. A strided A is stored whole.
        """
        if A.layout == torch.strided:
            m, n = A.shape[-2:]
            rows, cols = np.divmod(np.arange(m * n), max(n, 1))
            return cls(SparsityPattern(rows, cols, (m, n)), A.flatten(-2))
        return cls(*pattern_and_values(A))

    @classmethod
    def from_scipy(cls, A: Any, dtype: torch.dtype | None = None) -> Sparse:
        """Take the entries of a SciPy sparse matrix or array."""
        coo = A.tocoo()
        values = torch.from_numpy(np.array(coo.data))
        if dtype is None and not (values.is_floating_point() or values.is_complex()):
            dtype = torch.float64
        return cls(SparsityPattern(coo.row, coo.col, coo.shape), values.to(dtype or values.dtype))

    def to_torch(self, layout: torch.layout = torch.sparse_csr) -> Tensor:
        """Assemble a torch tensor of this layout; differentiable in the values."""
        if layout == torch.strided:
            return self.to_dense()
        return assemble(self.pattern, self.values, layout)

    def to_dense(self) -> Tensor:
        """Assemble a strided tensor; differentiable in the values. Cost: m n memory."""
        m, n = self.pattern.shape
        flat = torch.from_numpy(self.pattern.row.astype(np.int64) * n + self.pattern.col)
        out = self.values.new_zeros((*self.values.shape[:-1], m * n))
        return out.index_add(-1, flat.to(self.values.device), self.values).unflatten(-1, (m, n))

    def to_scipy(self) -> scipy.sparse.coo_array:
        """Assemble a SciPy COO array (no gradient)."""
        if len(self.values.shape) != 1:
            raise ValueError(f"Sparse.to_scipy: needs an unbatched matrix; got shape {self.shape}.")
        data = self.values.detach().cpu().numpy()
        return scipy.sparse.coo_array((data, (self.pattern.row, self.pattern.col)), self.shape)

    @property
    def T(self) -> Sparse:
        """The transpose; shares the values."""
        return Sparse(self.pattern.T, self.values)

    @property
    def H(self) -> Sparse:
        """The conjugate transpose."""
        return Sparse(self.pattern.T, self.values.conj())

    def __matmul__(self, v: Tensor) -> Tensor:
        """A v for v (..., n) if 1-D, else (..., n, k); differentiable in both, in every mode."""
        if not isinstance(v, Tensor):
            return NotImplemented
        m, n = self.pattern.shape
        vector = v.ndim == 1
        block = v.unsqueeze(-1) if vector else v
        if block.shape[-2] != n:
            raise ValueError(
                f"Sparse: A @ v needs {n} rows in v, one per column of A; got {tuple(v.shape)}."
            )
        lead = broadcast_shapes(self.values.shape[:-1], block.shape[:-2])
        size = math.prod(lead)
        values = self.values
        if values.ndim > 1:
            values = values.expand(*lead, values.shape[-1]).reshape(size, values.shape[-1])
        if block.ndim > 2:
            block = block.expand(*lead, *block.shape[-2:]).reshape(size, *block.shape[-2:])
        out = matmul(SparseStructure(self.pattern), (values,), block)
        out = out.reshape(*lead, m, out.shape[-1])
        return out.squeeze(-1) if vector else out


torch.utils._pytree.register_pytree_node(
    Sparse,
    lambda A: ([A.values], A.pattern),
    lambda leaves, pattern: _rebuild(pattern, next(iter(leaves))),
    serialized_type_name="funclsq.Sparse",
)


def _rebuild(pattern: SparsityPattern, values: Any) -> Sparse:
    """Rebuild without checks: transforms put placeholders where values belong."""
    out = object.__new__(Sparse)
    object.__setattr__(out, "pattern", pattern)
    object.__setattr__(out, "values", values)
    return out
