"""What users pass, checked once and brought to the shapes of the primitive."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy  # its subpackages load on first use
import torch
from torch import Tensor

from funclsq.beneath import differentiated
from funclsq.checks import (
    dense_tensor,
    from_array,
    real_dtype,
    require_finite,
    require_inexact,
    require_not_negative,
    require_real_like,
    require_same,
)
from funclsq.matrix_free import LinearOperator
from funclsq.operators import DenseStructure, SparseStructure
from funclsq.plan import Plan
from funclsq.precision import widening
from funclsq.settings import Settings
from funclsq.shapes import broadcast_shapes
from funclsq.sparse import Sparse
from funclsq.torch_sparse import is_sparse, pattern_and_values
from funclsq.traced import traced_plan, traced_structure

__all__ = ["Problem", "canonical", "matrix"]

_KINDS = (
    "a torch tensor (dense, COO, CSR, CSC, BSR, BSC), a scipy.sparse matrix, funclsq.Sparse or "
    "funclsq.LinearOperator"
)


class Problem(NamedTuple):
    """Operands in the primitive's shapes, and how to bring the answer back.

    ``lead`` are the batch dimensions of the answer, ``per_column`` says that every column is a
    member of the batch (weights differ by column), of which there are ``columns``; ``vector``
    that b was a vector; ``dtype`` is that of the data, and of the answer.
    """

    plan: Plan
    params: tuple[Tensor, ...]
    w: Tensor | None
    d2: Tensor | None
    b: Tensor
    x0: Tensor | None
    lead: tuple[int, ...]
    per_column: bool
    vector: bool
    columns: int
    dtype: torch.dtype

    def restore(self, x: Tensor) -> Tensor:
        """(n, k) or (B, n, k) -> (*lead, n) or (*lead, n, k)."""
        if self.per_column:
            x = x.squeeze(-1).unflatten(0, (*self.lead, self.columns)).movedim(-2, -1)
        elif self.lead:
            x = x.unflatten(0, self.lead)
        return (x.squeeze(-1) if self.vector else x).to(self.dtype)

    def restore_info(self, info: Tensor) -> Tensor:
        """(k, i) or (B, k, i) -> (*lead, i) or (*lead, k, i)."""
        if self.per_column:
            info = info.squeeze(-2).unflatten(0, (*self.lead, self.columns))
        elif self.lead:
            info = info.unflatten(0, self.lead)
        return (info.squeeze(-2) if self.vector else info).to(real_dtype(self.dtype))


def matrix(A: Any, name: str) -> tuple[Any, tuple[Tensor, ...], tuple[int, ...], str]:
    """Split A into (structure, params, batch shape, layout)."""
    if isinstance(A, Sparse):
        if not isinstance(A.values, Tensor):
            raise TypeError(
                f"{name}: the values of A must be a torch tensor; got "
                f"{type(A.values).__name__}. For JAX arrays use funclsq.jax.{name}."
            )
        require_inexact(A.values, "A", name)
        structure: Any
        if torch.compiler.is_compiling():
            structure = traced_structure(A.pattern.shape, A.pattern)
        else:
            structure = SparseStructure(A.pattern)
        return structure, (A.values,), tuple(A.values.shape[:-1]), "csr"
    if is_sparse(A):
        require_inexact(A, "A", name)
        layout = "coo" if A.layout == torch.sparse_coo else "csr"
        if A.ndim == 3 and A.layout in (torch.sparse_csr, torch.sparse_coo):
            raise ValueError(
                f"{name}: a batch of sparse matrices needs one pattern; got a sparse tensor of "
                f"shape {tuple(A.shape)}. Pass funclsq.Sparse(pattern, values) with values "
                "(B, nnz)."
            )
        pattern, values = pattern_and_values(A)
        return SparseStructure(pattern), (values,), (), layout
    if not isinstance(A, (Tensor, np.ndarray)) and scipy.sparse.issparse(A):
        A = Sparse.from_scipy(A)
        return SparseStructure(A.pattern), (A.values,), (), "csr"
    if isinstance(A, np.ndarray):
        A = from_array(A)
    if isinstance(A, Tensor):
        require_inexact(A, "A", name)
        if A.ndim < 2:
            raise ValueError(
                f"{name}: A must be a matrix (..., m, n); got shape {tuple(A.shape)}. Add the "
                "missing dimension with A[:, None] or A[None]."
            )
        if torch.compiler.is_compiling():
            return traced_structure(A.shape[-2:], None), (A,), tuple(A.shape[:-2]), "strided"
        return DenseStructure(*A.shape[-2:]), (A,), tuple(A.shape[:-2]), "strided"
    raise TypeError(f"{name}: A must be {_KINDS}; got {type(A).__name__}.")


def canonical(
    name: str,
    A: Any,
    b: Any,
    damp: Any,
    weights: Any,
    x0: Any,
    options: Settings,
    on_failure: str,
    check_finite: bool,
    compute_dtype: Any = None,
) -> Problem:
    """Check everything that shapes, dtypes and devices can tell, before any work."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(
            f"{name}: on_failure must be 'warn', 'raise' or 'ignore'; got {on_failure!r}."
        )
    b = dense_tensor(b, "b", name)
    require_inexact(b, "b", name)
    widened = widening(compute_dtype, b.dtype, name)
    if isinstance(A, LinearOperator):
        structure: Any = A.structure(widened(b.dtype), b.device)
        params, lead_a, layout = A.params, tuple[int, ...](), "operator"
    else:
        structure, params, lead_a, layout = matrix(A, name)
        require_same(params[0], b, "A", "b", name)
    m, n = structure.shape
    vector = b.ndim == 1
    if b.ndim == 0:
        raise ValueError(f"{name}: b must have shape ({m},) or (..., {m}, k); got a scalar.")
    rows = b.shape[0] if vector else b.shape[-2]
    if rows != m:
        raise ValueError(
            f"{name}: b must have {m} rows, one per row of A {(m, n)}; got shape "
            f"{tuple(b.shape)}. Pass b with shape ({m},) or ({m}, k)."
        )
    block = b.unsqueeze(-1) if vector else b
    k = block.shape[-1]
    w, w_lead, per_column = _weights(weights, b, m, k, vector, name)
    d2, d_lead, damped = _damp(damp, b, n, name, widened)
    start = _start(x0, b, n, k, vector, name)
    if start is not None and check_finite:
        require_finite(start, "x0", name)
    leads = {
        "A": lead_a,
        "b": tuple(block.shape[:-2]),
        "weights": w_lead,
        "damp": d_lead,
        "x0": () if start is None else tuple(start.shape[:-2]),
    }
    lead = _common_batch(leads, name)
    full = lead if not per_column else (*lead, k)
    if per_column:
        block = block.movedim(-1, -2).unsqueeze(-1)
        start = None if start is None else start.movedim(-1, -2).unsqueeze(-1)
        params = tuple(p.unsqueeze(p.ndim - d) for p, d in zip(params, structure.param_ndims))
        d2 = d2 if d2 is None or d2.ndim == 1 else d2.unsqueeze(-2)
        lead_a = (*lead_a, 1) if lead_a else lead_a
    params = tuple(
        _flat(p.reshape(p.shape[p.ndim - d :]) if not lead_a else p, full, d)
        for p, d in zip(params, structure.param_ndims)
    )
    rank = dict(options.given).get("rank", "auto")
    full_rank = _full_column_rank(rank, m, n, name)
    if torch.compiler.is_compiling():
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*params, block))
        fixed = (options, full_rank, damped, on_failure, check_finite, wanted)
        plan: Any = traced_plan(structure, *fixed)
    else:
        extra = (("layout", layout), ("vector", vector)) if callable(options.solver) else ()
        known = (structure, options.options(extra), full_rank, damped, on_failure, check_finite)
        shown = name != "lstsq"  # lstsq has nobody to show residual norms to
        plan = Plan.of(*known, shown, differentiated(*params, w, d2, block, start))

    def cast(t: Any) -> Any:
        return t if t is None else t.to(widened(t.dtype))

    return Problem(
        plan,
        tuple(map(cast, params)),
        cast(_flat(w, full, 1)),
        _flat(d2, full, 1),
        cast(_flat(block, full, 2)),
        cast(_flat(start, full, 2)),
        lead,
        per_column,
        vector,
        k,
        b.dtype,
    )


def _common_batch(leads: dict[str, tuple[int, ...]], name: str) -> tuple[int, ...]:
    try:
        return broadcast_shapes(*leads.values())
    except ValueError:
        given = ", ".join(f"{shape} of {what}" for what, shape in leads.items() if shape)
        raise ValueError(
            f"{name}: the batch dimensions must broadcast with each other; got {given}. Make them "
            "equal, or 1 where an operand is shared."
        ) from None


def _flat(t: Any, lead: tuple[int, ...], core: int) -> Any:
    """Broadcast the batch of t to ``lead`` and flatten it; an operand without batch stays so."""
    if t is None or t.ndim == core:
        return t
    return t.expand(*lead, *t.shape[t.ndim - core :]).reshape(
        math.prod(lead), *t.shape[t.ndim - core :]
    )


def _full_column_rank(rank: str | int, m: int, n: int, name: str) -> bool:
    if isinstance(rank, int) and rank > min(m, n):
        raise ValueError(
            f"{name}: rank must be at most min(m, n) = {min(m, n)} for A {(m, n)}; got {rank}."
        )
    return m >= n and rank in ("full", n)


def _weights(weights, b, m, k, vector, name):
    """Weights as (..., m), their batch shape, and whether they differ by column."""
    if weights is None:
        return None, (), False
    w = dense_tensor(weights, "weights", name)
    if w.dtype.is_complex:
        raise TypeError(f"{name}: weights must be real; got {w.dtype}.")
    require_inexact(w, "weights", name)
    require_real_like(w, b, "weights", name)
    require_not_negative(w, "weights", name)
    if w.ndim == 1 and w.shape[0] == m:
        return w, (), False
    if w.ndim >= 2 and w.shape[-2] == m and w.shape[-1] in ((1,) if vector else (1, k)):
        if w.shape[-1] == 1:
            w = w.squeeze(-1)
            return w, tuple(w.shape[:-1]), False
        w = w.movedim(-1, -2)
        return w, tuple(w.shape[:-2]), True
    raise ValueError(
        f"{name}: weights must have shape ({m},), one per row"
        f"{'' if vector or not k else f', or (..., {m}, {k}), one per row and column'}; got "
        f"{tuple(w.shape)}."
    )


def _damp(damp, b, n, name, widened):
    """damp^2 as (..., n), (..., 1) or None, its batch shape, and whether it is surely positive."""
    if isinstance(damp, (bool, complex)):
        raise TypeError(f"{name}: damp must be a real number or tensor; got {damp!r}.")
    if isinstance(damp, np.ndarray):
        damp = from_array(damp)
    if isinstance(damp, (int, float, np.floating, np.integer)):
        if not math.isfinite(damp) or damp < 0:
            raise ValueError(f"{name}: damp must be finite and >= 0; got {damp}.")
        if damp == 0:
            return None, (), False
        dtype = widened(real_dtype(b.dtype))
        return torch.full((1,), float(damp) ** 2, dtype=dtype, device=b.device), (), True
    if not isinstance(damp, Tensor):
        raise TypeError(f"{name}: damp must be a real number or tensor; got {type(damp).__name__}.")
    if damp.dtype.is_complex:
        raise TypeError(f"{name}: damp must be real; got {damp.dtype}.")
    require_inexact(damp, "damp", name)
    require_real_like(damp, b, "damp", name)
    if damp.ndim and damp.shape[-1] not in (1, n):
        raise ValueError(
            f"{name}: damp must be a scalar or have shape ({n},), one per column of A; got "
            f"{tuple(damp.shape)}."
        )
    require_not_negative(damp, "damp", name)
    square = damp.to(widened(damp.dtype)) ** 2  # squared after: 1e-25 has no square in float32
    square = square.unsqueeze(-1) if square.ndim == 0 else square
    return square, tuple(square.shape[:-1]), False


def _start(x0, b, n, k, vector, name):
    """x0 as (..., n, k)."""
    if x0 is None:
        return None
    x0 = dense_tensor(x0, "x0", name)
    require_same(x0, b, "x0", "b", name)
    if vector:
        if x0.ndim == 0 or x0.shape[-1] != n:
            raise ValueError(
                f"{name}: x0 must have shape ({n},), one per column of A; got {tuple(x0.shape)}."
            )
        return x0.unsqueeze(-1)
    if x0.ndim == 1 and x0.shape[0] == n:
        return x0.unsqueeze(-1).expand(n, k)
    if x0.ndim < 2 or x0.shape[-2] != n or x0.shape[-1] not in (1, k):
        raise ValueError(
            f"{name}: x0 must have shape ({n},) or (..., {n}, {k}); got {tuple(x0.shape)}."
        )
    return x0.expand(*x0.shape[:-1], k)
