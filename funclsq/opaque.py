"""Raw kernels as opaque operators, so that linearize and compile record them as calls.

Without this, tracing would look inside: a NumPy solve would be baked in as a constant.
The operators carry the vmap rules themselves too: gradcheck and autograd's is_grads_batched
vmap over what a backward pass calls, below the autograd Functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.batching import vmap_sddmm, vmap_solve, vmap_spmm
from funclsq.entries import sddmm
from funclsq.operators import SparseStructure
from funclsq.pattern import pattern_of_handle
from funclsq.plan import plan_of_handle
from funclsq.raw import INFO, raw_solve

__all__ = ["sddmm_op", "solve_op", "spmm_op"]


@torch.library.custom_op("funclsq::solve", mutates_args=())
def _single_solve_op(
    param: Tensor,
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    plan: int,
    primary: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return raw_solve(plan_of_handle(plan), (param,), w, d2, c, g, gate, primary, need_x)


@torch.library.custom_op("funclsq::solve_params", mutates_args=())
def _listed_solve_op(
    params: list[Tensor],
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    plan: int,
    primary: bool,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
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


_listed_solve_op.register_fake(_fake_solve)
_single_solve_op.register_fake(lambda param, *rest: _fake_solve((param,), *rest))


def solve_op(params, *rest):
    """S(A, w, d2; c, g) on (w, d2, c, g, gate, plan handle, primary, need_x), not differentiable.

    With need_x false and c absent, only s = A x is promised. One tensor is passed
    bare, since autograd's own vmap takes no lists.
    """
    if len(params) == 1:
        return _single_solve_op(params[0], *rest)
    return _listed_solve_op(list(params), *rest)


@torch.library.custom_op("funclsq::spmm", mutates_args=())
def spmm_op(values: Tensor, v: Tensor, pattern: int, adjoint: bool) -> Tensor:
    """A v, or A^H v, for values at a pattern."""
    op = SparseStructure(pattern_of_handle(pattern)).bind((values,))
    out = op.rmv(v) if adjoint else op.mv(v)
    return out.contiguous()


@spmm_op.register_fake
def _(values, v, pattern, adjoint):
    rows = pattern_of_handle(pattern).shape[1 if adjoint else 0]
    lead = values.shape[:-1] if values.ndim == 2 else v.shape[:-2]
    return v.new_empty([*lead, rows, v.shape[-1]])


@torch.library.custom_op("funclsq::sddmm", mutates_args=())
def sddmm_op(U: Tensor, V: Tensor, pattern: int) -> Tensor:
    """U V^H sampled at a pattern."""
    batched = U.ndim == 3 or V.ndim == 3
    if batched:
        count = U.shape[0] if U.ndim == 3 else V.shape[0]
        U, V = (t.expand(count, *t.shape[-2:]) for t in (U, V))
    return sddmm(pattern_of_handle(pattern), U, V, batched)


@sddmm_op.register_fake
def _(U, V, pattern):
    lead = U.shape[:-2] if U.ndim == 3 else V.shape[:-2]
    return U.new_empty([*lead, pattern_of_handle(pattern).nnz])


def _vmap_solve_op(size, dims, tensors, plan, primary, need_x):
    def call(w, d2, c, g, gate, *params):
        return solve_op(params, w, d2, c, g, gate, plan, primary, need_x)

    structure = plan_of_handle(plan).structure
    return vmap_solve(size, dims, structure.param_ndims, tensors, call), (0, 0, 0)


@_single_solve_op.register_vmap
def _(info, in_dims, param, w, d2, c, g, gate, plan, primary, need_x):
    dims, tensors = (*in_dims[1:6], in_dims[0]), (w, d2, c, g, gate, param)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary, need_x)


@_listed_solve_op.register_vmap
def _(info, in_dims, params, w, d2, c, g, gate, plan, primary, need_x):
    dims, tensors = (*in_dims[1:6], *in_dims[0]), (w, d2, c, g, gate, *params)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary, need_x)


@spmm_op.register_vmap
def _(info, in_dims, values, v, pattern, adjoint):
    def call(values, v):
        return spmm_op(values, v, pattern, adjoint)

    return vmap_spmm(info.batch_size, in_dims[:2], values, v, call), 0


@sddmm_op.register_vmap
def _(info, in_dims, U, V, pattern):
    def call(U, V):
        return sddmm_op(U, V, pattern)

    return vmap_sddmm(info.batch_size, in_dims[:2], U, V, call), 0
