"""Sparse Jacobians from few products: columns that share no row are found together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funclsq.pattern import SparsityPattern

__all__ = ["color_columns", "recover_values"]


def color_columns(pattern: SparsityPattern) -> np.ndarray:
    """Give each column a colour such that no two of one colour share a row; kept per pattern.

    Greedy, columns of most entries first (Curtis, Powell & Reid 1974). Cost: the sum over the
    entries of the sizes of their rows.
    """
    found = pattern.cache.get("colors")
    if found is not None:
        return found
    n = pattern.shape[1]
    colors = np.full(n, -1, dtype=np.int64)
    degrees = np.diff(pattern.t_indptr)
    for j in np.argsort(-degrees, kind="stable"):
        rows = pattern.t_indices[pattern.t_indptr[j] : pattern.t_indptr[j + 1]]
        taken = {
            int(c)
            for i in rows
            for c in colors[pattern.indices[pattern.indptr[i] : pattern.indptr[i + 1]]]
        }
        color = 0
        while color in taken:
            color += 1
        colors[j] = color
    return pattern.cache.setdefault("colors", colors)


def recover_values(mv: Callable[[Any], Any], pattern: SparsityPattern, dtype: Any) -> Any:
    """Entries of a linear map at its pattern, from one product per colour.

    Parameters
    ----------
    mv : callable
        v (n,) -> A v (m,).
    pattern : SparsityPattern
        Positions that hold every nonzero of A, none repeated.
    dtype : dtype
        Of v.

    Returns
    -------
    array, shape (nnz,)
        NaN throughout if A has entries outside the pattern (tested on one vector).
    """
    colors = color_columns(pattern)
    count = int(colors.max(initial=-1)) + 1
    seeds = np.zeros((count, pattern.shape[1]))
    seeds[colors, np.arange(colors.size)] = 1
    products = jax.vmap(mv)(jnp.asarray(seeds, dtype))
    values = products[colors[pattern.col], pattern.row]
    probe = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, pattern.shape[1]), dtype)
    seen = jnp.zeros(pattern.shape[0], values.dtype)
    seen = seen.at[pattern.row].add(values * probe[pattern.col])
    size = jnp.zeros(pattern.shape[0], jnp.finfo(dtype).dtype)
    size = size.at[pattern.row].add(jnp.abs(values) * 1.5)
    error = jnp.abs(mv(probe) - seen)
    bound = float(jnp.finfo(dtype).eps) ** 0.75 * (size + size.max(initial=0))
    return jnp.where((error <= bound).all() | ~jnp.isfinite(error).all(), values, jnp.nan)
