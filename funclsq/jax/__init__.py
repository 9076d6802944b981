"""funclsq inside JAX: the same least squares in jit, grad, vmap, scan. Changes no configuration."""

from funclsq.jax.convert import from_torch, to_torch
from funclsq.jax.linear_operator import LinearOperator
from funclsq.jax.lstsq import lstsq, solve
from funclsq.jax.sparse import Sparse

__all__ = ["LinearOperator", "Sparse", "from_torch", "lstsq", "solve", "to_torch"]
