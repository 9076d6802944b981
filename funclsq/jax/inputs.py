"""What users pass to the JAX functions, checked at trace time: shapes, dtypes, x64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import torch
from jax.experimental import sparse as jsparse

from funclsq.jax.bridge import mechanism
from funclsq.jax.convert import from_torch, require_representable
from funclsq.jax.primitive import Problem
from funclsq.jax.sparse import Sparse, concrete_pattern
from funclsq.jax.structures import Dense, Indexed, Static
from funclsq.methods._protocol import Options
from funclsq.sparse import Sparse as TorchSparse

__all__ = ["Call", "array", "canonical", "matrix"]

_KINDS = (
    "a JAX array, BCOO, BCSR, funclsq.jax.Sparse, funclsq.jax.LinearOperator or a "
    "scipy.sparse matrix"
)
_DTYPES = ("float32", "float64", "complex64", "complex128")


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call: the problem, and how answers are brought back."""

    problem: Problem
    lead: tuple[int, ...]
    per_column: bool
    vector: bool


def canonical(
    name: str,
    A: Any,
    b: Any,
    damp: Any,
    weights: Any,
    x0: Any,
    options: Options,
    on_failure: str,
    check_finite: bool,
    compute_dtype: Any,
) -> tuple[Call, dict[str, Any]]:
    """Check everything that shapes and dtypes can tell; nothing is computed."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(
            f"{name}: on_failure must be 'warn', 'raise' or 'ignore'; got {on_failure!r}."
        )
    if hasattr(A, "funclsq_structure"):  # LinearOperator, which sits on a higher floor
        b = array(b, "b", name)
        _inexact(b, "b", name)
        dtype, kept = b.dtype, None
        a_lead: tuple[int, ...] = ()
        structure, params, aux = A.funclsq_structure(dtype)
        _lsmr_only(options, compute_dtype, name)
    else:
        structure, params, aux, kept, a_lead = matrix(A, name)
        dtype = params[0].dtype
        b = array(b, "b", name, dtype)
        _same(b, dtype, "b", name)
    m, n = structure.shape
    vector = b.ndim == 1
    if b.ndim == 0 or b.shape[0 if vector else -2] != m:
        raise ValueError(
            f"{name}: b must have {m} rows, one per row of A {(m, n)}; got shape {b.shape}. Pass "
            f"b with shape ({m},) or ({m}, k)."
        )
    k = 1 if vector else b.shape[-1]
    b_lead = () if vector else b.shape[:-2]
    weights, w_lead, per_column = _weights(weights, dtype, m, k, vector, name)
    damp, d_lead, damped = _damp(damp, dtype, n, name)
    x0, x_lead = _start(x0, dtype, n, k, vector, name)
    try:
        lead = jnp.broadcast_shapes(a_lead, b_lead, w_lead, d_lead, x_lead)
    except ValueError:
        raise ValueError(
            f"{name}: leading (batch) dimensions must broadcast; got {a_lead} for A, {b_lead} for "
            f"b, {w_lead} for weights, {d_lead} for damp and {x_lead} for x0."
        ) from None
    if compute_dtype not in (None, "float64"):
        raise ValueError(f"{name}: compute_dtype must be None or 'float64'; got {compute_dtype!r}.")
    rank = options.rank
    if isinstance(rank, int) and rank > min(m, n):
        raise ValueError(
            f"{name}: rank must be at most min(m, n) = {min(m, n)} for A {(m, n)}; got {rank}."
        )
    if callable(options.solver):
        extra = (("layout", structure.layout), ("vector", vector))
        options = dataclasses.replace(options, extra=(*options.extra, *extra))
    full = m >= n and rank in ("full", n)
    problem = Problem(
        structure,
        options,
        full,
        damped,
        on_failure,
        check_finite,
        compute_dtype,
        mechanism(),
        residuals=name != "lstsq" or on_failure == "raise",
        primary=True,
        results=("x", "info") if _told(name, on_failure, structure) else ("x",),
    )
    call = Call(problem, lead, per_column, vector)
    arrays = {
        "params": params, "aux": aux, "kept": kept, "b": b, "damp": damp, "weights": weights,
        "x0": x0,
    }  # fmt: skip
    return call, arrays


def _told(name: str, on_failure: str, structure: Any) -> bool:
    """Whether anybody reads how x was reached: the host gives its warnings by itself."""
    warned = on_failure == "warn" and structure.solves_in_jax
    return name != "lstsq" or on_failure == "raise" or warned


def matrix(A: Any, name: str) -> tuple[Any, tuple[Any, ...], tuple[Any, ...], Any, tuple[int, ...]]:
    """Split A into (structure, params, index operands, entries kept, batch shape)."""
    if scipy.sparse.issparse(A):
        A = Sparse.from_scipy(A)
    elif isinstance(A, torch.Tensor):
        A = from_torch(A) if A.layout == torch.strided else Sparse.from_torch(A)
    elif isinstance(A, TorchSparse):
        torch_values = isinstance(A.values, torch.Tensor)
        A = Sparse.from_torch(A) if torch_values else Sparse(A.pattern, A.values)
    if isinstance(A, Sparse):
        values = array(A.values, "A", name)
        _inexact(values, "A", name)
        return Static(A.pattern), (values,), (), None, values.shape[:-1]
    if isinstance(A, (jsparse.BCOO, jsparse.BCSR)):
        return _bcoo(A, name)
    if isinstance(A, jsparse.JAXSparse):
        raise TypeError(f"{name}: A must be {_KINDS}; got {type(A).__name__}. Convert it to BCOO.")
    if not isinstance(A, (jax.Array, np.ndarray, list, tuple)):
        raise TypeError(f"{name}: A must be {_KINDS}; got {type(A).__name__}.")
    A = array(A, "A", name)
    _inexact(A, "A", name)
    if A.ndim < 2:
        raise ValueError(
            f"{name}: A must be a matrix (..., m, n); got shape {A.shape}. Add the missing "
            "dimension with A[:, None] or A[None]."
        )
    return Dense(A.shape[-2:]), (A,), (), None, A.shape[:-2]


def _lsmr_only(options, compute_dtype, name):
    """Refuse settings that mean nothing for the LSMR that solves with a LinearOperator."""
    plain = Options()
    own = ("solver", "rank", "atol", "btol", "conlim", "maxiter", "rcond", "scale")
    other = [
        f.name
        for f in dataclasses.fields(Options)
        if f.name not in own and getattr(options, f.name) != getattr(plain, f.name)
    ]
    if options.solver not in ("auto", "lsmr"):
        raise ValueError(
            f"{name}: a LinearOperator is solved by LSMR in JAX: solver must be 'auto' or 'lsmr'; "
            f"got {options.solver!r}. For other solvers pass a matrix."
        )
    if other or compute_dtype is not None:
        setting = other[0] if other else "compute_dtype"
        raise ValueError(f"{name}: {setting} is not supported for a LinearOperator; leave it out.")


def _bcoo(A, name):
    if A.n_dense or A.n_batch:
        raise TypeError(
            f"{name}: a {type(A).__name__} must have neither batch nor dense dimensions; got "
            f"n_batch={A.n_batch}, n_dense={A.n_dense}. Use jax.vmap over its leading dimension, "
            "or funclsq.jax.Sparse(pattern, values) with values (B, nnz)."
        )
    _inexact(A.data, "A", name)
    coo = isinstance(A, jsparse.BCOO)
    index = (A.indices,) if coo else (A.indices, A.indptr)
    if any(isinstance(t, jax.core.Tracer) for t in index):
        return Indexed(tuple(A.shape), "coo" if coo else "csr"), (A.data,), index, None, ()
    pattern, kept = concrete_pattern(A)
    return Static(pattern), (A.data,), (), kept, ()


def array(t: Any, what: str, name: str, dtype: Any = None) -> Any:
    """Bring t to a JAX array without losing a bit; lists and Python numbers take ``dtype``."""
    if isinstance(t, jax.Array):
        return t
    if isinstance(t, torch.Tensor):
        if t.layout != torch.strided:
            raise TypeError(f"{name}: {what} must be dense; got layout {t.layout}.")
        require_representable(str(t.dtype).removeprefix("torch."), f"{name}: {what}")
        return from_torch(t)
    if isinstance(t, (np.ndarray, np.generic)):
        require_representable(t.dtype, f"{name}: {what}")
        return jnp.asarray(t)
    if isinstance(t, (list, tuple, int, float, complex)) and not isinstance(t, bool):
        return jnp.asarray(t, dtype)
    raise TypeError(
        f"{name}: {what} must be an array; got {type(t).__name__}. Convert it with jnp.asarray."
    )


def _inexact(t: Any, what: str, name: str) -> None:
    if np.dtype(t.dtype).name not in _DTYPES:
        raise TypeError(
            f"{name}: {what} must be float32, float64, complex64 or complex128; got {t.dtype}. "
            f"Convert it with {what}.astype(float)."
        )


def _same(t: Any, dtype: Any, what: str, name: str) -> None:
    _inexact(t, what, name)
    if t.dtype != dtype:
        raise TypeError(
            f"{name}: A and {what} must have one dtype; got {dtype} and {t.dtype}. Convert one "
            f"with .astype({np.dtype(dtype).name!r})."
        )


def _real_operand(t: Any, what: str, dtype: Any, name: str) -> Any:
    real = jnp.finfo(dtype).dtype
    t = array(t, what, name, None if isinstance(t, complex) else real)
    if jnp.iscomplexobj(t):
        raise TypeError(f"{name}: {what} must be real; got {t.dtype}.")
    if t.dtype != real and not getattr(t, "weak_type", False):
        raise TypeError(
            f"{name}: {what} must have dtype {real} beside A of {dtype}; got {t.dtype}. Convert "
            f"it with .astype({real.name!r})."
        )
    if not isinstance(t, jax.core.Tracer) and t.size:
        lowest = float(np.min(np.asarray(t)))
        if lowest < 0:
            raise ValueError(
                f"{name}: {what} must not be negative; got a smallest entry of {lowest:.3g}. Pass "
                f"{what} >= 0."
            )
    return t


def _weights(weights, dtype, m, k, vector, name):
    """Weights, their batch shape, and whether they differ by column."""
    if weights is None:
        return None, (), False
    w = _real_operand(weights, "weights", dtype, name)
    if w.shape == (m,):
        return w, (), False
    if w.ndim >= 2 and w.shape[-2] == m and w.shape[-1] in ((1,) if vector else (1, k)):
        return w, w.shape[:-2], w.shape[-1] != 1
    raise ValueError(
        f"{name}: weights must have shape ({m},), one per row"
        f"{'' if vector else f', or (..., {m}, {k}), one per row and column'}; got {w.shape}."
    )


def _damp(damp, dtype, n, name):
    """Damping (None if zero for certain), batch shape, whether it is positive for certain."""
    if isinstance(damp, (bool, complex)):
        raise TypeError(f"{name}: damp must be a real number or array; got {damp!r}.")
    if isinstance(damp, (int, float, np.floating, np.integer)):
        if not math.isfinite(damp) or damp < 0:
            raise ValueError(f"{name}: damp must be finite and >= 0; got {damp}.")
        return (None, (), False) if damp == 0 else (float(damp), (), True)
    damp = _real_operand(damp, "damp", dtype, name)
    if damp.ndim and damp.shape[-1] not in (1, n):
        raise ValueError(
            f"{name}: damp must be a scalar or have shape ({n},), one per column of A; got "
            f"{damp.shape}."
        )
    return damp, damp.shape[:-1], False


def _start(x0, dtype, n, k, vector, name):
    """The starting point and its batch shape."""
    if x0 is None:
        return None, ()
    x0 = array(x0, "x0", name, dtype)
    _same(x0, dtype, "x0", name)
    if x0.shape == (n,):
        return x0, ()
    if vector and x0.ndim and x0.shape[-1] == n:
        return x0, x0.shape[:-1]
    if vector or x0.ndim < 2 or x0.shape[-2] != n or x0.shape[-1] not in (1, k):
        raise ValueError(
            f"{name}: x0 must have shape ({n},)"
            f"{'' if vector else f' or (..., {n}, {k})'}; got {x0.shape}."
        )
    return x0, x0.shape[:-2]
