"""What A is, as the JAX primitive sees it: a static, hashable structure and its operands.

A structure says how the parameters of A (differentiable) and its index operands (not) give
products with A and A^H, differentiable by JAX, and what torch structure solves the problem on the
host. Blocks of columns are (n, k), or (B, n, k) where the problem carries a batch dimension.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from funclsq.jax import products
from funclsq.jax.term import ADJOINT, FORWARD
from funclsq.operators import DenseStructure, SparseStructure
from funclsq.pattern import SparsityPattern

__all__ = ["Dense", "Indexed", "Static"]

_dense = functools.lru_cache(maxsize=256)(DenseStructure)


def _sparse(pattern: SparsityPattern) -> SparseStructure:
    """Make one structure per pattern: the host compares them by identity first."""
    found = pattern.cache.get("structure")
    if found is None:
        found = pattern.cache.setdefault("structure", SparseStructure(pattern))
    return found


class Bilinear:
    """A structure whose entries are its parameter: A_dot v is the product with A_dot's entries."""

    solves_in_jax = False

    def mv(self, params: Any, aux: Any, v: Any) -> Any:
        """A v."""
        raise NotImplementedError

    def rmv(self, params: Any, aux: Any, u: Any) -> Any:
        """A^H u."""
        raise NotImplementedError

    def fan_dot(self, params, params_dot, aux, blocks, terms):
        """+-A_dot v or +-A_dot^H u for each block, as its term says."""
        del params
        return [term.product(self, params_dot, aux, t) for t, term in zip(blocks, terms)]


@dataclasses.dataclass(frozen=True)
class Dense(Bilinear):
    """A strided matrix, (m, n) or (B, m, n)."""

    shape: tuple[int, int]
    param_ndims = (2,)
    aux_ndims = ()
    layout = "strided"

    def mv(self, params, aux, v):
        """A v."""
        del aux
        return jnp.matmul(params[0], v, precision=jax.lax.Precision.HIGHEST)

    def rmv(self, params, aux, u):
        """A^H u."""
        del aux
        adjoint = jnp.conj(jnp.swapaxes(params[0], -1, -2))
        return jnp.matmul(adjoint, u, precision=jax.lax.Precision.HIGHEST)

    def host(self, params, aux):
        """Structure and parameters for the torch core."""
        del aux
        return _dense(*self.shape), params


@dataclasses.dataclass(frozen=True)
class Static(Bilinear):
    """A sparse matrix whose pattern is known at trace time; values (nnz,) or (B, nnz)."""

    pattern: SparsityPattern
    param_ndims = (1,)
    aux_ndims = ()
    layout = "csr"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.pattern.shape

    def mv(self, params, aux, v):
        """A v."""
        del aux
        return products.fan(self.pattern, params[0], (v,), (FORWARD,), lazy=True)[0]

    def rmv(self, params, aux, u):
        """A^H u."""
        del aux
        return products.fan(self.pattern, params[0], (u,), (ADJOINT,), lazy=True)[0]

    def fan_dot(self, params, params_dot, aux, blocks, terms):
        """+-A_dot v or +-A_dot^H u for each block, in one host call."""
        del params, aux
        return products.fan(self.pattern, params_dot[0], blocks, terms, lazy=True)

    def host(self, params, aux):
        """Structure and parameters for the torch core."""
        del aux
        return _sparse(self.pattern), params


@dataclasses.dataclass(frozen=True)
class Indexed(Bilinear):
    """A sparse matrix whose indices are operands (traced BCOO and BCSR).

    ``layout`` is "coo", with index operand (nse, 2), or "csr", with (nse,) columns and (m + 1,)
    row starts. Entries whose index lies outside the shape are padding and count for nothing.
    """

    shape: tuple[int, int]
    layout: str
    param_ndims = (1,)

    @property
    def aux_ndims(self) -> tuple[int, ...]:
        """Dimensions of the index operands."""
        return (2,) if self.layout == "coo" else (1, 1)

    def _rows_and_columns(self, aux):
        if self.layout == "coo":
            return aux[0][:, 0], aux[0][:, 1]
        columns, starts = aux
        entry = jnp.arange(columns.shape[0])
        return jnp.searchsorted(starts, entry, side="right") - 1, columns

    def _apply(self, values, source, target, size, v):
        def single(values, v):
            taken = v.at[source].get(mode="fill", fill_value=0)
            inside = (target >= 0) & (target < size) & (source >= 0) & (source < v.shape[0])
            terms = jnp.where(inside[:, None], values[:, None] * taken, 0)
            return jnp.zeros((size, v.shape[1]), terms.dtype).at[target].add(terms, mode="drop")

        axes = (0 if values.ndim == 2 else None, 0 if v.ndim == 3 else None)
        return single(values, v) if axes == (None, None) else jax.vmap(single, axes)(values, v)

    def mv(self, params, aux, v):
        """A v."""
        row, col = self._rows_and_columns(aux)
        return self._apply(params[0], col, row, self.shape[0], v)

    def rmv(self, params, aux, u):
        """A^H u."""
        row, col = self._rows_and_columns(aux)
        return self._apply(jnp.conj(params[0]), row, col, self.shape[1], u)

    def host(self, params, aux):
        """Structure and parameters for the torch core; the pattern is found by content."""
        pattern, kept = pattern_of(self.layout, aux, self.shape)
        values = params[0]
        if kept is not None:
            values = values.index_select(-1, kept)
        return _sparse(pattern), (values,)


_KEEP = 8
_lock = threading.Lock()
_numbers = itertools.count()
_known: collections.OrderedDict[int, tuple[Any, ...]] = collections.OrderedDict()


def pattern_of(
    layout: str, aux: tuple[Tensor, ...], shape: tuple[int, int]
) -> tuple[SparsityPattern, Tensor | None]:
    """Pattern with these indices, and which entries are not padding (None: all).

    Equal indices find the same pattern again, and with it every plan made from it. Cost: one
    comparison of the indices for each of the few patterns used last.
    """
    arrays = tuple(t.numpy() for t in aux)
    with _lock:
        candidates = list(reversed(_known.items()))
    for number, (known_layout, known_shape, copies, found) in candidates:
        if (known_layout, known_shape) == (layout, shape) and all(
            map(np.array_equal, copies, arrays)
        ):
            with _lock:
                if number in _known:
                    _known.move_to_end(number)
            return found
    copies = tuple(a.copy() for a in arrays)
    found = make_pattern(layout, copies, shape)
    with _lock:
        _known[next(_numbers)] = (layout, shape, copies, found)
        while len(_known) > _KEEP:
            _known.popitem(last=False)
    return found


def make_pattern(layout, arrays, shape):
    """Build the pattern of index arrays on the host, without padded entries."""
    if layout == "coo":
        row, col = arrays[0][:, 0], arrays[0][:, 1]
    else:
        col, starts = arrays
        row = np.searchsorted(starts, np.arange(col.size), side="right") - 1
    m, n = shape
    inside = (row >= 0) & (row < m) & (col >= 0) & (col < n)
    if inside.all():
        return SparsityPattern(row, col, shape), None
    kept = np.flatnonzero(inside)
    return SparsityPattern(row[kept], col[kept], shape), torch.from_numpy(kept)
