"""From what a user passes to a plain NumPy problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from funclsq.pattern import SparsityPattern
from funclsq.validate.problem import Problem, stacked_svd

__all__ = ["as_problem"]


def as_problem(
    A: Any, b: Any, damp: Any, weights: Any, x0: Any, rank: Any, rng: np.random.Generator
) -> Problem:
    """Return the problem, in double precision and with its rank settled.

    Parameters
    ----------
    A : matrix
        Dense or sparse, of torch, SciPy, NumPy, JAX or funclsq; 2-D.
    b : array or None
        None stands for a random vector, which no A fits.
    damp, weights, x0 : array, optional
        As for :func:`funclsq.lstsq`. damp is taken for differentiable where it is not 0.
    rank : {"auto", "full"} or int
        Of A. "auto" counts singular values above max(m, n) eps of the largest.
    rng : numpy.random.Generator
        For b.

    Raises
    ------
    TypeError
        If A is no matrix with entries (a LinearOperator, say).
    ValueError
        If shapes do not fit.
    """
    row, col, values, shape, dense = _entries(A)
    m = shape[0]
    b = rng.standard_normal(m) if b is None else _array(b)
    if b.ndim not in (1, 2) or b.shape[0] != m:
        raise ValueError(
            f"cross_check: b must have shape ({m},) or ({m}, k) for A {shape}; got {b.shape}."
        )
    given = {"A": values, "b": b.astype(np.result_type(b, values.real))}
    if damp is not None and np.any(_array(damp) != 0):
        given["damp"] = _array(damp)
    if weights is not None:
        given["weights"] = _array(weights)
    if x0 is not None:
        given["x0"] = _array(x0)
    dtype = np.result_type(values.dtype, b.dtype if b.dtype.kind == "c" else values.dtype)
    wide = np.complex128 if dtype.kind == "c" else np.float64
    inputs = {
        key: a.astype(np.float64 if key in ("damp", "weights") else wide)
        for key, a in given.items()
    }
    problem = Problem(row, col, inputs, shape, -1, dtype, dense)
    return Problem(row, col, inputs, shape, _rank(problem, rank), dtype, dense)


def _entries(A: Any) -> tuple[Any, Any, np.ndarray, Any, bool]:
    """Return (row, col, values, shape, whether dense)."""
    pattern = getattr(A, "pattern", None)
    if isinstance(pattern, SparsityPattern):
        _require_matrix(A.shape)
        return pattern.row, pattern.col, _array(A.values), pattern.shape, False
    if isinstance(A, Tensor) and A.layout != torch.strided:
        _require_matrix(A.shape)
        coo = A.detach() if A.layout == torch.sparse_coo else A.detach().to_sparse_coo()
        row, col = coo._indices().numpy()
        return row, col, _array(coo._values()), tuple(A.shape), False
    if scipy.sparse.issparse(A):
        coo = A.tocoo()
        return coo.row, coo.col, coo.data, A.shape, False
    if (
        hasattr(A, "indices") and hasattr(A, "data") and not isinstance(A, Tensor)
    ):  # jax.experimental.sparse.BCOO
        _require_matrix(A.shape)
        row, col = np.asarray(A.indices).T
        return row, col, np.asarray(A.data), tuple(A.shape), False
    if not hasattr(A, "__array__"):
        raise TypeError(
            f"cross_check: A must be a matrix with entries; got {type(A).__name__}. For a "
            "matrix-free operator use validate.compare(torch_fn, jax_fn, *args)."
        )
    A = _array(A)
    _require_matrix(A.shape)
    row, col = np.indices(A.shape).reshape(2, -1)
    return row, col, A.ravel(), A.shape, True


def _require_matrix(shape: Any) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"cross_check: A must be one (m, n) matrix; got shape {tuple(shape)}. Check the "
            "members of a batch one by one."
        )


def _array(a: Any) -> np.ndarray:
    a = a.detach().resolve_conj().cpu().numpy() if isinstance(a, Tensor) else np.asarray(a)
    return a if a.dtype.kind in "fc" else a.astype(np.float64)


def _rank(problem: Problem, rank: Any) -> int:
    """Return the rank of [W^(1/2) A; D]."""
    m, n = problem.shape
    damp = problem.damping()
    if damp.all() and n:
        return n
    if rank == "full":
        rank = min(m, n)
    if rank != "auto" and not damp.any():
        return int(rank)
    if not problem.small:
        if rank == "auto":
            raise ValueError(
                f"cross_check: A {problem.shape} is too large to find its rank by an SVD. Pass "
                'rank="full" or its rank, or damp > 0.'
            )
        return int(rank)
    _, part = problem.column_problems()[0]
    s = stacked_svd(part)[1]
    eps = np.finfo(problem.dtype).eps
    return int((s > s.max(initial=0) * max(m, n) * eps).sum())
