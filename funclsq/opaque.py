"""Raw kernels as opaque operators, so that linearize and compile record them as calls.

Without this, tracing would look inside: a NumPy solve would be baked in as a constant.
The operators carry the vmap rules themselves too: gradcheck and autograd's is_grads_batched
vmap over what a backward pass calls, below the autograd Functions.

They are registered with the dispatcher itself. ``torch.library.custom_op`` wraps a function so that
its first call imports the whole of torch.compile, which takes as long as importing torch does, and
every call goes through layers that cost more than a small product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.batching import vmap_sddmm, vmap_solve, vmap_spmm
from funclsq.entries import sddmm
from funclsq.full_precision import full_precision
from funclsq.operators import SparseStructure
from funclsq.pattern import pattern_of_handle
from funclsq.plan import plan_of_handle
from funclsq.raw import INFO, raw_solve

__all__ = ["sddmm_op", "solve_op", "spmm_op"]

_former = torch.ops.funclsq.__dict__.pop("library", None)
if _former is not None:  # this module is loaded again
    _former._destroy()
_library = torch.library.Library("funclsq", "DEF")
torch.ops.funclsq.__dict__["library"] = _library


_OPERANDS = "Tensor? w, Tensor? d2, Tensor? c, Tensor? g, Tensor? gate, int plan"
_SOLVE = f"{_OPERANDS}, bool primary, bool need_x) -> (Tensor, Tensor, Tensor)"


def _operator(schema: str, kernel: Callable, fake: Callable, vmap: Callable) -> Any:
    """Register a function of tensors that returns new ones, and return it as an operator."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,)).split("::")[-1]
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"funclsq::{name}", fake, lib=_library)
    torch.library.register_vmap(f"funclsq::{name}", vmap, lib=_library)
    return getattr(torch.ops.funclsq, name).default


def _single_solve(param, w, d2, c, g, gate, plan, primary, need_x):
    return raw_solve(plan_of_handle(plan), (param,), w, d2, c, g, gate, primary, need_x)


def _listed_solve(params, w, d2, c, g, gate, plan, primary, need_x):
    return raw_solve(plan_of_handle(plan), tuple(params), w, d2, c, g, gate, primary, need_x)


def _fake_solve(params, w, d2, c, g, gate, plan, primary, need_x):
    structure = plan_of_handle(plan).structure
    m, n = structure.shape
    some = c if c is not None else g
    pairs = [*zip(params, structure.param_ndims), (w, 1), (d2, 1), (c, 2), (g, 2)]
    lead = next(([t.shape[0]] for t, d in pairs if t is not None and t.ndim > d), [])
    k = some.shape[-1]
    real = some.real.dtype if some.is_complex() else some.dtype
    return (
        some.new_empty([*lead, n, k]),
        some.new_empty([*lead, m, k]),
        some.new_empty([*lead, k, INFO], dtype=real),
    )


def solve_op(params, *rest):
    """S(A, w, d2; c, g) on (w, d2, c, g, gate, plan handle, primary, need_x), not differentiable.

    With need_x false and c absent, only s = A x is promised. One tensor is passed
    bare, since autograd's own vmap takes no lists.
    """
    if len(params) == 1:
        return _single_solve_op(params[0], *rest)
    return _listed_solve_op(list(params), *rest)


def _spmm(values: Tensor, v: Tensor, pattern: int, adjoint: bool) -> Tensor:
    op = SparseStructure(pattern_of_handle(pattern)).bind((values,))
    with full_precision(v.device.type):
        out = op.rmv(v) if adjoint else op.mv(v)
    return out.contiguous()


def _fake_spmm(values, v, pattern, adjoint):
    rows = pattern_of_handle(pattern).shape[1 if adjoint else 0]
    lead = values.shape[:-1] if values.ndim == 2 else v.shape[:-2]
    return v.new_empty([*lead, rows, v.shape[-1]])


def _sddmm(U: Tensor, V: Tensor, pattern: int) -> Tensor:
    batched = U.ndim == 3 or V.ndim == 3
    if batched:
        count = U.shape[0] if U.ndim == 3 else V.shape[0]
        U, V = (t.expand(count, *t.shape[-2:]) for t in (U, V))
    with full_precision(U.device.type):
        return sddmm(pattern_of_handle(pattern), U, V, batched)


def _fake_sddmm(U, V, pattern):
    lead = U.shape[:-2] if U.ndim == 3 else V.shape[:-2]
    return U.new_empty([*lead, pattern_of_handle(pattern).nnz])


def _vmap_solve_op(size, dims, tensors, plan, primary, need_x):
    def call(w, d2, c, g, gate, *params):
        return solve_op(params, w, d2, c, g, gate, plan, primary, need_x)

    structure = plan_of_handle(plan).structure
    return vmap_solve(size, dims, structure.param_ndims, tensors, call), (0, 0, 0)


def _vmap_single(info, in_dims, param, w, d2, c, g, gate, plan, primary, need_x):
    dims, tensors = (*in_dims[1:6], in_dims[0]), (w, d2, c, g, gate, param)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary, need_x)


def _vmap_listed(info, in_dims, params, w, d2, c, g, gate, plan, primary, need_x):
    dims, tensors = (*in_dims[1:6], *in_dims[0]), (w, d2, c, g, gate, *params)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary, need_x)


def _vmap_spmm_op(info, in_dims, values, v, pattern, adjoint):
    def call(values, v):
        return spmm_op(values, v, pattern, adjoint)

    return vmap_spmm(info.batch_size, in_dims[:2], values, v, call), 0


def _vmap_sddmm_op(info, in_dims, U, V, pattern):
    def call(U, V):
        return sddmm_op(U, V, pattern)

    return vmap_sddmm(info.batch_size, in_dims[:2], U, V, call), 0


_single_solve_op = _operator(
    f"solve(Tensor param, {_SOLVE}",
    _single_solve,
    lambda param, *rest: _fake_solve((param,), *rest),
    _vmap_single,
)
_listed_solve_op = _operator(
    f"solve_params(Tensor[] params, {_SOLVE}", _listed_solve, _fake_solve, _vmap_listed
)

spmm_op = _operator(
    "spmm(Tensor values, Tensor v, int pattern, bool adjoint) -> Tensor",
    _spmm,
    _fake_spmm,
    _vmap_spmm_op,
)
"""A v, or A^H v, for values at a pattern: (values, v, pattern handle, adjoint)."""

sddmm_op = _operator(
    "sddmm(Tensor U, Tensor V, int pattern) -> Tensor", _sddmm, _fake_sddmm, _vmap_sddmm_op
)
"""U V^H sampled at a pattern: (U, V, pattern handle)."""
