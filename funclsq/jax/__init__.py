"""funclsq inside JAX: the same least squares in jit, grad, vmap, scan. Changes no configuration.

``funclsq.jax.lineax`` (import it by name) holds the operator and the solvers for lineax.
"""

from funclsq.jax.convert import from_torch, to_torch
from funclsq.jax.linear_operator import LinearOperator
from funclsq.jax.lstsq import lstsq, solve
from funclsq.jax.sparse import Sparse

try:
    from funclsq.jax.modules import LeastSquares, SparseLinear
except ImportError:  # equinox is optional
    from funclsq.jax.missing import LeastSquares, SparseLinear  # type: ignore[assignment]

__all__ = [
    "LeastSquares",
    "LinearOperator",
    "Sparse",
    "SparseLinear",
    "from_torch",
    "lstsq",
    "solve",
    "to_torch",
]
