"""Equinox modules: a trainable sparse least-squares layer and a trainable sparse linear layer."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from funclsq.jax.convert import jax_array
from funclsq.jax.lstsq import lstsq
from funclsq.jax.sparse import Sparse
from funclsq.pattern import SparsityPattern

__all__ = ["LeastSquares", "SparseLinear"]


class LeastSquares(eqx.Module):
    """b -> argmin_x ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 with trainable A, damp and W.

    The pattern of A is static; its values are trained, and so are damp and the weights where they
    are given (as logarithms, so they stay positive).

    Parameters
    ----------
    pattern : SparsityPattern
        Where the entries of A are.
    values : array, shape (nnz,)
        Initial entries.
    damp : float or array, scalar or (n,), optional
        Initial damping > 0; absent: none.
    weights : array, shape (m,), optional
        Initial weights > 0; absent: 1.
    **options
        Settings of :func:`funclsq.jax.lstsq`.

    Examples
    --------
    >>> import jax.numpy as jnp, funclsq as fl, funclsq.jax as flj
    >>> S = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    >>> layer = flj.LeastSquares(S, jnp.array([2.0, 1.0, 1.0]))
    >>> layer(jnp.array([2.0, 1.0, 3.0]))
    Array([1., 2.], dtype=float32)
    """

    A: Sparse
    log_damp: jax.Array | None
    log_weights: jax.Array | None
    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(
        self,
        pattern: SparsityPattern,
        values: Any,
        damp: Any = None,
        weights: Any = None,
        **options: Any,
    ) -> None:
        self.A = Sparse(pattern, jax_array(values, "LeastSquares: values"))
        real = jnp.finfo(self.A.dtype).dtype
        self.log_damp = _log(damp, "damp", real)
        self.log_weights = _log(weights, "weights", real)
        self.options = tuple(sorted(options.items()))

    @property
    def damp(self) -> Any:
        """The damping."""
        return 0.0 if self.log_damp is None else jnp.exp(self.log_damp)

    @property
    def weights(self) -> Any:
        """The weights, or None."""
        return None if self.log_weights is None else jnp.exp(self.log_weights)

    def __call__(self, b: Any, x0: Any = None, *, key: Any = None) -> Any:
        """Solve for b, (m,) or (m, k)."""
        del key
        return lstsq(self.A, b, damp=self.damp, weights=self.weights, x0=x0, **dict(self.options))


def _log(t: Any, what: str, real: Any) -> Any:
    if t is None:
        return None
    if not isinstance(t, jax.core.Tracer) and not bool((np.asarray(t) > 0).all()):
        raise ValueError(f"LeastSquares: {what} must be positive, as its logarithm is trained.")
    return jnp.log(jnp.asarray(t, real))


class SparseLinear(eqx.Module):
    """x -> A x + bias with a sparse A of static pattern and trainable values.

    Parameters
    ----------
    pattern : SparsityPattern
        Where the entries of the (m, n) matrix are.
    use_bias : bool
        Whether to add a trainable (m,) bias.
    dtype : dtype, optional
        Of the parameters; JAX's default float.
    key : PRNG key
        For the initial values: normal, of variance 1 / (entries in the row).

    Examples
    --------
    >>> import jax, funclsq as fl, funclsq.jax as flj
    >>> S = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    >>> flj.SparseLinear(S, key=jax.random.key(0))(jax.numpy.ones(2)).shape
    (3,)
    """

    A: Sparse
    bias: jax.Array | None

    def __init__(
        self, pattern: SparsityPattern, use_bias: bool = True, dtype: Any = None, *, key: Any
    ) -> None:
        dtype = jnp.dtype(float if dtype is None else dtype)
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        m = pattern.shape[0]
        counts = np.bincount(pattern.row, minlength=m)[pattern.row]
        scale = jnp.asarray(1 / np.sqrt(np.maximum(counts, 1)), dtype)
        self.A = Sparse(pattern, scale * jax.random.normal(key, (pattern.nnz,), dtype))
        self.bias = jnp.zeros((m,), dtype) if use_bias else None

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        """A x + bias for x (n,)."""
        del key
        y = self.A @ x
        return y if self.bias is None else y + self.bias
