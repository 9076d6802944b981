"""A sparse matrix for JAX: static pattern, differentiable values."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse

from funclsq.jax import products
from funclsq.jax.convert import from_torch, jax_array, require_representable, to_torch
from funclsq.jax.structures import make_pattern
from funclsq.pattern import SparsityPattern
from funclsq.sparse import Sparse as TorchSparse

__all__ = ["Sparse"]


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """The (m, n) matrix, or batch of matrices, with these values at a pattern's entries.

    A pytree: ``values`` is its one leaf, the pattern is static. It passes through every JAX
    transform, and its gradient is a ``Sparse`` of the same pattern. Products ``A @ v`` and
    ``A.rmatvec(u)`` run torch's CSR kernels and are differentiable to any order.

    Parameters
    ----------
    pattern : SparsityPattern
        Where the entries are (``funclsq.SparsityPattern(row, col, (m, n))``).
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
    >>> import jax.numpy as jnp, funclsq as fl, funclsq.jax as flj
    >>> S = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    >>> A = flj.Sparse(S, jnp.array([2.0, 1.0, 1.0]))
    >>> flj.lstsq(A, jnp.array([2.0, 1.0, 3.0]))
    Array([1., 2.], dtype=float32)
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

    def tree_flatten(self) -> tuple[tuple[Any], SparsityPattern]:
        """Split into leaves and static part."""
        return (self.values,), self.pattern

    @classmethod
    def tree_unflatten(cls, pattern: SparsityPattern, leaves: tuple[Any]) -> Sparse:
        """Inverse of tree_flatten; takes placeholders of any kind for values."""
        out = object.__new__(cls)
        object.__setattr__(out, "pattern", pattern)
        object.__setattr__(out, "values", leaves[0])
        return out

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., m, n)."""
        return (*self.values.shape[:-1], *self.pattern.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions, batch included."""
        return self.values.ndim + 1

    @property
    def dtype(self) -> Any:
        """Dtype of the values."""
        return self.values.dtype

    def __repr__(self) -> str:
        values = self.values
        if not hasattr(values, "dtype"):
            return f"Sparse({self.pattern!r}, {values!r})"
        return f"Sparse(shape={self.shape}, nnz={self.pattern.nnz}, dtype={values.dtype})"

    def __matmul__(self, v: Any) -> Any:
        """A v for v (n,) or (..., n, k)."""
        return self._product(products.mv, v, self.pattern.shape[1])

    def rmatvec(self, u: Any) -> Any:
        """A^H u for u (m,) or (..., m, k)."""
        return self._product(products.rmv, u, self.pattern.shape[0])

    def _product(self, product: Any, v: Any, rows: int) -> Any:
        v = jax_array(v, "Sparse: the other factor")
        vector = v.ndim == 1
        if v.ndim == 0 or v.shape[0 if vector else -2] != rows:
            raise ValueError(
                f"Sparse: the other factor must have {rows} rows beside a matrix of shape "
                f"{self.shape}; got shape {v.shape}."
            )
        values = jax_array(self.values, "Sparse: values")
        dtype = jnp.result_type(values, v)
        block = (v[:, None] if vector else v).astype(dtype)
        call = lambda a, t: product(self.pattern, a, t)  # noqa: E731
        lead = jnp.broadcast_shapes(values.shape[:-1], block.shape[:-2])
        if lead:
            values = jnp.broadcast_to(values, (*lead, values.shape[-1]))
            block = jnp.broadcast_to(block, (*lead, *block.shape[-2:]))
            for _ in lead:
                call = jax.vmap(call)
        out = call(values.astype(dtype), block)
        return out[..., 0] if vector else out

    @property
    def T(self) -> Sparse:
        """The transpose; entries keep their order."""
        return Sparse(self.pattern.T, self.values)

    def todense(self) -> Any:
        """Assemble a dense array. Cost: m n memory."""
        out = jnp.zeros(self.shape, self.dtype)
        return out.at[..., self.pattern.row, self.pattern.col].add(self.values)

    @classmethod
    def fromdense(cls, A: Any) -> Sparse:
        """Take the nonzero entries of a concrete matrix."""
        A = np.asarray(A)
        row, col = np.nonzero(A)
        values = jax_array(A[row, col], "Sparse.fromdense: the matrix")
        return cls(SparsityPattern(row, col, A.shape), values)

    @classmethod
    def from_bcoo(cls, A: Any) -> Sparse:
        """Take a BCOO or BCSR matrix with concrete indices; its data may be traced.

        Padded entries (index beyond the shape) are left out.
        """
        pattern, kept = concrete_pattern(A)
        return cls(pattern, A.data if kept is None else A.data[..., kept])

    def to_bcoo(self) -> Any:
        """Return the same matrix as a ``jax.experimental.sparse.BCOO``."""
        indices = np.stack([self.pattern.row, self.pattern.col], -1)
        if self.values.ndim != 1:
            raise ValueError(f"Sparse.to_bcoo: needs an unbatched matrix; got shape {self.shape}.")
        return jsparse.BCOO((self.values, jnp.asarray(indices)), shape=self.pattern.shape)

    @classmethod
    def from_torch(cls, A: Any) -> Sparse:
        """Take a ``funclsq.Sparse`` or a torch tensor; memory is shared where possible."""
        A = A if isinstance(A, TorchSparse) else TorchSparse.from_torch(A)
        return cls(A.pattern, from_torch(A.values))

    def to_torch(self) -> TorchSparse:
        """Return the same matrix as a ``funclsq.Sparse``; memory is shared where possible."""
        return TorchSparse(self.pattern, to_torch(self.values))

    @classmethod
    def from_scipy(cls, A: Any) -> Sparse:
        """Take the entries of a SciPy sparse matrix or array."""
        coo = A.tocoo()
        data = coo.data if coo.data.dtype.kind in "fc" else coo.data.astype(np.float64)
        require_representable(data.dtype, "Sparse.from_scipy: the matrix")
        return cls(SparsityPattern(coo.row, coo.col, coo.shape), jnp.asarray(data))


jax.tree_util.register_pytree_node(
    TorchSparse,
    lambda s: ((s.values,), s.pattern),
    lambda pattern, leaves: TorchSparse(pattern, leaves[0]),
)


_patterns: dict[tuple[int, ...], tuple[Any, ...]] = {}


def concrete_pattern(A: Any) -> tuple[SparsityPattern, np.ndarray | None]:
    """Pattern of a BCOO or BCSR with concrete indices, and which entries are not padding.

    Kept as long as the index arrays live (JAX arrays do not change, so identity is enough).
    """
    coo = isinstance(A, jsparse.BCOO)
    arrays = (A.indices,) if coo else (A.indices, A.indptr)
    key = (*map(id, arrays), *A.shape)
    held = _patterns.get(key)
    if held is not None and all(ref() is t for ref, t in zip(held[0], arrays)):
        return held[1]
    pattern, kept = make_pattern("coo" if coo else "csr", [np.asarray(t) for t in arrays], A.shape)
    found = (pattern, None if kept is None else kept.numpy())
    forget = lambda _, key=key: _patterns.pop(key, None)  # noqa: E731
    _patterns[key] = (tuple(weakref.ref(t, forget) for t in arrays), found)
    return found
