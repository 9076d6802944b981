"""Derivatives of least squares, of every order, from one primitive that is closed under them.

The primitive. For A (m, n) of any rank, weights w >= 0, damping d2 = damp^2 >= 0, let
W = diag(w), D2 = diag(d2), G = A^H W A + D2, and G^+ its pseudo-inverse. Then

    S(A, w, d2; c, g) = (x, A x),     x = G^+ (A^H W c + g).

With g absent x solves min ||W^(1/2)(A x - c)||^2 + x^H D2 x, of all minimisers the smallest
(call it T c); with c absent it applies G^+. T^H k = W A G^+ k. Let P = G^+ G project on the range
of G, and suppose that the rank of G is constant near (A, w, d2).

Tangent. For a Hermitian G of constant rank (Golub & Pereyra 1973, eq. 4.12 with its symmetries)

    d(G^+) = -G^+ dG G^+  +  G^+ G^+ dG (I - P)  +  (I - P) dG G^+ G^+.

Apply it to h = A^H W c + g and write r = c - A x, n_g = (I - P) g = (I - P) h, u = G^+ x. In
dG = dA^H W A + A^H dW A + A^H W dA + dD2, every factor A (I - P), dD2 (I - P) vanishes: the null
space of G is where W^(1/2) A and D2 are zero (and, the rank being constant, rows of weight 0
reach nothing new). So

    dx = S(dc - dA x,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g)).x          (1)
         + (I - P) dA^H W A u                                                  (2)
    d(A x) = dA x + A dx.

Cotangent. For (k, k_ax) let k <- k + A^H k_ax, (z, A z) = S(-; k), n_k = (I - P) k. Then

    c_bar  = W A z,       g_bar = z,
    w_bar  = Re(conj(A z) r),      d2_bar = -Re(conj(z) x)         (summed over columns)
    A_bar  = (W r) z^H - (W A z) x^H + k_ax x^H                     from (1)
             + (W A u) n_k^H                                       from (2)
             + (W A G^+ z) n_g^H                                   from T(dA n_g),

A_bar at the stored entries only. All of it is finite at w = 0, where differentiating sqrt(w)
is not, and at damp = 0. The two last terms vanish where G is invertible. Whether it is, is a
property of (A, w, d2) and not of k: it is known statically (full_rank, damped), or S reports it
as data per problem, ``deficient``, and a solve gated by it costs nothing where it is zero.

b, x0 and damp are composed around S: x = x0 + S(A, w, damp^2; b - A x0).x.

References
----------
G. H. Golub and V. Pereyra, SIAM J. Numer. Anal. 10 (1973) 413-432, doi:10.1137/0710036.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.autograd import Function

from funclsq import matrix_free
from funclsq.operators import SparseStructure, sddmm
from funclsq.pattern import SparsityPattern, pattern_of_handle
from funclsq.raw import INFO, Plan, plan_of_handle, raw_solve

__all__ = ["matmul", "outer", "rmatmul", "solve"]

_SLOT_DEFICIENT = 6


# ---------------------------------------------------------------------------------------------
# Raw kernels as opaque operators, so that linearize and compile record them as calls.


@torch.library.custom_op("funclsq::solve", mutates_args=())
def _solve_op(
    param: Tensor,
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    plan: int,
    primary: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return raw_solve(plan_of_handle(plan), (param,), w, d2, c, g, gate, primary)


@torch.library.custom_op("funclsq::solve_params", mutates_args=())
def _solve_params_op(
    params: list[Tensor],
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    plan: int,
    primary: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return raw_solve(plan_of_handle(plan), tuple(params), w, d2, c, g, gate, primary)


def _fake_solve(params, w, d2, c, g, gate, plan, primary):
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


_solve_params_op.register_fake(_fake_solve)
_solve_op.register_fake(lambda param, *rest: _fake_solve((param,), *rest))


def _call_solve_op(params, *rest):
    """Run the operator; one tensor is passed bare, since autograd's own vmap takes no lists."""
    if len(params) == 1:
        return _solve_op(params[0], *rest)
    return _solve_params_op(list(params), *rest)


@torch.library.custom_op("funclsq::spmm", mutates_args=())
def _spmm_op(values: Tensor, v: Tensor, pattern: int, adjoint: bool) -> Tensor:
    op = SparseStructure(pattern_of_handle(pattern)).bind((values,))
    out = op.rmv(v) if adjoint else op.mv(v)
    return out.contiguous()


@_spmm_op.register_fake
def _(values, v, pattern, adjoint):
    rows = pattern_of_handle(pattern).shape[1 if adjoint else 0]
    lead = values.shape[:-1] if values.ndim == 2 else v.shape[:-2]
    return v.new_empty([*lead, rows, v.shape[-1]])


@torch.library.custom_op("funclsq::sddmm", mutates_args=())
def _sddmm_op(U: Tensor, V: Tensor, pattern: int) -> Tensor:
    batched = U.ndim == 3 or V.ndim == 3
    if batched:
        count = U.shape[0] if U.ndim == 3 else V.shape[0]
        U, V = (t.expand(count, *t.shape[-2:]) for t in (U, V))
    return sddmm(pattern_of_handle(pattern), U, V, batched)


@_sddmm_op.register_fake
def _(U, V, pattern):
    lead = U.shape[:-2] if U.ndim == 3 else V.shape[:-2]
    return U.new_empty([*lead, pattern_of_handle(pattern).nnz])


# ---------------------------------------------------------------------------------------------
# vmap: a batch of columns is more columns; a batch of matrices is a leading dimension.


def _front(t: Tensor | None, dim: int | None) -> Tensor | None:
    return t if t is None or dim is None else t.movedim(dim, 0)


def _fold_columns(size: int, t: Tensor | None, dim: int | None) -> Tensor | None:
    """(..., rows, k) batched at dim -> (..., rows, size * k)."""
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    return t.movedim(0, -2).flatten(-2)


def _unfold_columns(size: int, t: Tensor) -> Tensor:
    return t.unflatten(-1, (size, -1)).movedim(-2, 0)


def _merge_batch(size: int, tensors, dims, cores):
    """Bring the batch to the front, merged with an inner batch; None keeps shared operands."""
    moved = [_front(t, d) for t, d in zip(tensors, dims)]
    inner = None
    for t, d, core in zip(moved, dims, cores):
        if t is not None and t.ndim > core + (d is not None):
            inner = t.shape[0 if d is None else 1]
    if inner is None:
        return moved, None
    out = []
    for t, d, core in zip(moved, dims, cores):
        if t is None or (d is None and t.ndim == core):
            out.append(t)
            continue
        if d is None:
            t = t.unsqueeze(0)
        elif t.ndim == core + 1:
            t = t.unsqueeze(1)
        out.append(t.expand(size, inner, *t.shape[2:]).flatten(0, 1))
    return out, inner


def _split_batch(size: int, inner: int | None, t: Tensor) -> Tensor:
    return t if inner is None else t.unflatten(0, (size, inner))


def _vmap_spmm(size, dims, values, v, call):
    if dims[0] is None:  # one matrix: more columns
        return _unfold_columns(size, call(values, _fold_columns(size, v, dims[1])))
    (values, v), inner = _merge_batch(size, (values, v), dims, (1, 2))
    return _split_batch(size, inner, call(values, v))


def _vmap_sddmm(size, dims, U, V, call):
    (U, V), inner = _merge_batch(size, (U, V), dims, (2, 2))
    return _split_batch(size, inner, call(U, V))


def _vmap_solve(size, dims, param_ndims, tensors, call):
    """Batch (w, d2, c, g, gate, *params), each at its entry of dims or shared."""
    w, d2, c, g, gate, *params = tensors
    if all(d is None for d in (*dims[:2], *dims[5:])):  # one matrix: more columns
        if dims[4] is not None:  # one matrix is deficient or not, for every column
            gate = gate.movedim(dims[4], 0).amax(0)
        c, g = _fold_columns(size, c, dims[2]), _fold_columns(size, g, dims[3])
        x, ax, info = call(w, d2, c, g, gate, *params)
        table = info.unflatten(-2, (size, -1)).movedim(-3, 0)
        return _unfold_columns(size, x), _unfold_columns(size, ax), table
    merged, inner = _merge_batch(size, tensors, dims, (1, 1, 2, 2, 0, *param_ndims))
    return tuple(_split_batch(size, inner, t) for t in call(*merged))


# The operators themselves carry the same rules: gradcheck and autograd's is_grads_batched vmap
# over what a backward pass calls, below the Functions.


def _vmap_solve_op(size, dims, tensors, plan, primary):
    def call(w, d2, c, g, gate, *params):
        return _call_solve_op(params, w, d2, c, g, gate, plan, primary)

    structure = plan_of_handle(plan).structure
    return _vmap_solve(size, dims, structure.param_ndims, tensors, call), (0, 0, 0)


@_solve_op.register_vmap
def _(info, in_dims, param, w, d2, c, g, gate, plan, primary):
    dims, tensors = (*in_dims[1:6], in_dims[0]), (w, d2, c, g, gate, param)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary)


@_solve_params_op.register_vmap
def _(info, in_dims, params, w, d2, c, g, gate, plan, primary):
    dims, tensors = (*in_dims[1:6], *in_dims[0]), (w, d2, c, g, gate, *params)
    return _vmap_solve_op(info.batch_size, dims, tensors, plan, primary)


@_spmm_op.register_vmap
def _(info, in_dims, values, v, pattern, adjoint):
    def call(values, v):
        return _spmm_op(values, v, pattern, adjoint)

    return _vmap_spmm(info.batch_size, in_dims[:2], values, v, call), 0


@_sddmm_op.register_vmap
def _(info, in_dims, U, V, pattern):
    def call(U, V):
        return _sddmm_op(U, V, pattern)

    return _vmap_sddmm(info.batch_size, in_dims[:2], U, V, call), 0


# ---------------------------------------------------------------------------------------------
# Sparse products: each is the derivative of the others.


class _ReverseSpMM(Function):
    """A v, or A^H v, for sparse A: the face for torch.compile, which knows no jvp."""

    @staticmethod
    def forward(values, v, pattern, adjoint):
        return _spmm_op(values, v, pattern.handle, adjoint)

    @staticmethod
    def setup_context(ctx, inputs, output):
        values, v, ctx.pattern, ctx.adjoint = inputs
        ctx.save_for_backward(values, v)
        ctx.save_for_forward(values, v)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, out_bar):
        values, v = ctx.saved_tensors
        values_bar = v_bar = None
        if out_bar is None:
            return None, None, None, None
        if ctx.needs_input_grad[0]:
            pair = (v, out_bar) if ctx.adjoint else (out_bar, v)
            values_bar = _sampled(ctx.pattern, values, *pair)
        if ctx.needs_input_grad[1]:
            v_bar = _reduce(_spmm(values, out_bar, ctx.pattern, not ctx.adjoint), v)
        return values_bar, v_bar, None, None


class _SpMM(_ReverseSpMM):
    """A v, or A^H v, for sparse A, in every mode."""

    @staticmethod
    def jvp(ctx, values_dot, v_dot, *_):
        with _nested_forward_mode():
            values, v = _primals(ctx)
            conj = values_dot
            out = None
            if conj is not None:
                out = _spmm(conj, v, ctx.pattern, ctx.adjoint)
            if v_dot is not None:
                part = _spmm(values, v_dot, ctx.pattern, ctx.adjoint)
                out = part if out is None else out + part
        return out

    @staticmethod
    def vmap(info, in_dims, values, v, pattern, adjoint):
        def call(values, v):
            return _spmm(values, v, pattern, adjoint)

        return _vmap_spmm(info.batch_size, in_dims[:2], values, v, call), 0


class _ReverseSDDMM(Function):
    """sum_k U[row, k] conj(V[col, k]) at each entry, one row per batch member."""

    @staticmethod
    def forward(U, V, pattern):
        return _sddmm_op(U, V, pattern.handle)

    @staticmethod
    def setup_context(ctx, inputs, output):
        U, V, ctx.pattern = inputs
        ctx.save_for_backward(U, V)
        ctx.save_for_forward(U, V)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, values_bar):
        U, V = ctx.saved_tensors
        if values_bar is None:
            return None, None, None
        U_bar = V_bar = None
        if ctx.needs_input_grad[0]:
            U_bar = _reduce(_spmm(values_bar, V, ctx.pattern, False), U)
        if ctx.needs_input_grad[1]:
            V_bar = _reduce(_spmm(values_bar, U, ctx.pattern, True), V)
        return U_bar, V_bar, None


class _SDDMM(_ReverseSDDMM):
    """The sampled outer product in every mode."""

    @staticmethod
    def jvp(ctx, U_dot, V_dot, *_):
        with _nested_forward_mode():
            U, V = _primals(ctx)
            out = None
            if U_dot is not None:
                out = _sddmm(ctx.pattern, U_dot, V)
            if V_dot is not None:
                part = _sddmm(ctx.pattern, U, V_dot)
                out = part if out is None else out + part
        return out

    @staticmethod
    def vmap(info, in_dims, U, V, pattern):
        def call(U, V):
            return _sddmm(pattern, U, V)

        return _vmap_sddmm(info.batch_size, in_dims[:2], U, V, call), 0


def _spmm(values: Tensor, v: Tensor, pattern: SparsityPattern, adjoint: bool) -> Tensor:
    face = _ReverseSpMM if torch.compiler.is_compiling() else _SpMM
    return face.apply(values, v, pattern, adjoint)


def _sddmm(pattern: SparsityPattern, U: Tensor, V: Tensor) -> Tensor:
    face = _ReverseSDDMM if torch.compiler.is_compiling() else _SDDMM
    return face.apply(U, V, pattern)


def _sampled(pattern: SparsityPattern, like: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """SDDMM shaped like ``like``: shared values collect the sum over the batch."""
    if like.ndim == 1 and (U.ndim == 3 or V.ndim == 3):
        U, V = _batch_to_columns(U, V)
    return _sddmm(pattern, U, V)


def _batch_to_columns(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    size = U.shape[0] if U.ndim == 3 else V.shape[0]
    U, V = (t.expand(size, *t.shape[-2:]).movedim(0, 1).flatten(1) for t in (U, V))
    return U, V


def _reduce(t: Tensor, like: Tensor) -> Tensor:
    """Sum over the batch where the operand was shared by it."""
    return t.sum(0) if t.ndim > like.ndim else t


# ---------------------------------------------------------------------------------------------
# Products with A of any structure, differentiable in everything.


def matmul(structure: Any, params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """A v for a block of columns, (n, k) or (B, n, k)."""
    if structure.kind == "sparse":
        return _spmm(params[0], v, structure.pattern, False)
    if structure.kind == "dense":
        return params[0] @ v
    return matrix_free.apply(structure, params, v)


def rmatmul(structure: Any, params: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """A^H u for a block of columns, (m, k) or (B, m, k)."""
    if structure.kind == "sparse":
        return _spmm(params[0], u, structure.pattern, True)
    if structure.kind == "dense":
        return params[0].mH @ u
    return matrix_free.apply_adjoint(structure, params, u)


def outer(structure: Any, params: tuple[Tensor, ...], U: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    """Cotangents of params that the matrix cotangent U V^H stands for."""
    if structure.kind == "sparse":
        return (_sampled(structure.pattern, params[0], U, V),)
    if structure.kind == "dense":
        if params[0].ndim == 2 and (U.ndim == 3 or V.ndim == 3):
            U, V = _batch_to_columns(U, V)
        return (U @ V.mH,)
    if not params:
        return ()
    return matrix_free.pull_params(lambda p: matrix_free.apply(structure, p, V), params, U)


def _matmul_dot(structure, params, params_dot, v):
    if structure.kind != "matrix_free":
        return matmul(structure, params_dot, v)
    return matrix_free.push_params(lambda p: matrix_free.apply(structure, p, v), params, params_dot)


def _rmatmul_dot(structure, params, params_dot, u):
    if structure.kind != "matrix_free":
        return rmatmul(structure, params_dot, u)
    return matrix_free.push_params(
        lambda p: matrix_free.apply_adjoint(structure, p, u), params, params_dot
    )


# ---------------------------------------------------------------------------------------------
# The primitive.


class _ReverseSolve(Function):
    """S with its reverse rule only: the face for torch.compile."""

    @staticmethod
    def forward(plan, primary, w, d2, c, g, gate, *params):
        return _call_solve_op(params, w, d2, c, g, gate, plan.handle, primary)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, _, w, d2, c, g, gate, *params = inputs
        x, ax, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, d2, c, g, gate, x, ax, info, *params)
        ctx.save_for_forward(w, d2, c, g, gate, x, ax, info, *params)

    @staticmethod
    def backward(ctx, k, k_ax, _):
        w, d2, c, g, gate, x, ax, info, *params = ctx.saved_tensors
        bars = _pull(
            ctx.plan, w, d2, c, g, gate, x, ax, info, tuple(params), k, k_ax, ctx.needs_input_grad
        )
        return None, None, *bars


class _Solve(_ReverseSolve):
    """S in every mode."""

    @staticmethod
    def jvp(ctx, *tangents):
        with _nested_forward_mode():
            w, d2, c, g, gate, x, ax, info, *params = _primals(ctx)
            x_dot, ax_dot = _push(
                ctx.plan, w, d2, c, g, gate, x, ax, info, tuple(params), tangents[2:]
            )
        return x_dot, ax_dot, None

    @staticmethod
    def vmap(batch, in_dims, plan, primary, *tensors):
        def call(w, d2, c, g, gate, *params):
            return solve(plan, w, d2, c, g, gate, params, primary)

        out = _vmap_solve(batch.batch_size, in_dims[2:], plan.structure.param_ndims, tensors, call)
        return out, (0, 0, 0)


def solve(
    plan: Plan,
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    params: tuple[Tensor, ...],
    primary: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """S(A, w, d2; c, g) -> (x, A x, info), differentiable in every tensor but gate."""
    face = _ReverseSolve if torch.compiler.is_compiling() else _Solve
    return face.apply(plan, primary, w, d2, c, g, gate, *params)


def _pull(plan, w, d2, c, g, gate, x, ax, info, params, k, k_ax, needs):
    """Cotangents of (w, d2, c, g, gate, *params)."""
    count = 5 + len(params)
    if k is None and k_ax is None:
        return (None,) * count
    need_w, need_d2, need_c, need_g, _, *need_params = needs[2:]
    structure = plan.structure
    if k_ax is not None:
        pulled = rmatmul(structure, params, k_ax)
        k = pulled if k is None else k + pulled
    z, az, _ = solve(plan, w, d2, None, k, gate, params)
    waz = _rows(w, az)
    r = -ax if c is None else c - ax
    w_bar = d2_bar = c_bar = g_bar = None
    if need_c:
        c_bar = _reduce(waz, c)
    if need_g:
        g_bar = _reduce(z, g)
    if need_w:
        w_bar = _reduce((az.conj() * r).real.sum(-1), w)
    if need_d2:
        d2_bar = _reduce(-(z.conj() * x).real.sum(-1), d2)
    params_bar: tuple[Tensor | None, ...] = (None,) * len(params)
    if any(need_params):
        lefts, rights = [_rows(w, r), -waz], [z, x]
        if k_ax is not None:
            lefts.append(k_ax)
            rights.append(x)
        deficient = _deficiency(plan, info, gate)
        if deficient is not None:
            _, au, _ = solve(plan, w, d2, None, x, deficient, params)
            lefts.append(_rows(w, au))
            rights.append(_null(structure, params, w, d2, k, z, az, deficient))
            if g is not None:
                n_g = _null_of_g(plan, w, d2, c, g, x, ax, params, deficient)
                _, agz, _ = solve(plan, w, d2, None, z, deficient, params)
                lefts.append(_rows(w, agz))
                rights.append(n_g)
        U, V = _columns(lefts), _columns(rights)
        params_bar = outer(structure, params, U, V)
    return w_bar, d2_bar, c_bar, g_bar, None, *params_bar


def _push(plan, w, d2, c, g, gate, x, ax, info, params, tangents):
    """Tangents of (x, A x) for tangents of (w, d2, c, g, gate, *params)."""
    w_dot, d2_dot, c_dot, g_dot, _, *params_dot = tangents
    structure = plan.structure
    first, second = c_dot, g_dot
    moved = any(t is not None for t in params_dot)
    r = -ax if c is None else c - ax
    deficient = null_term = adx = None
    if moved:
        params_dot = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(params, params_dot)
        )
        adx = _matmul_dot(structure, params, params_dot, x)
        first = -adx if first is None else first - adx
        second = _plus(second, _rmatmul_dot(structure, params, params_dot, _rows(w, r)))
        deficient = _deficiency(plan, info, gate)
    if w_dot is not None:
        second = _plus(second, rmatmul(structure, params, _rows(w_dot, r)))
    if d2_dot is not None:
        second = _plus(second, -d2_dot.unsqueeze(-1) * x)
    if deficient is not None:
        if g is not None:
            n_g = _null_of_g(plan, w, d2, c, g, x, ax, params, deficient)
            moved_null = _matmul_dot(structure, params, params_dot, n_g)
            correction, _, _ = solve(plan, w, d2, moved_null, None, deficient, params)
            second = _plus(second, correction)
        _, au, _ = solve(plan, w, d2, None, x, deficient, params)
        v = _rmatmul_dot(structure, params, params_dot, _rows(w, au))
        z, az, _ = solve(plan, w, d2, None, v, deficient, params)
        null_term = _null(structure, params, w, d2, v, z, az, deficient)
    if first is None and second is None:
        return None, None
    x_dot, ax_dot, _ = solve(plan, w, d2, first, second, gate, params)
    if null_term is not None:
        x_dot = x_dot + null_term
        ax_dot = ax_dot + matmul(structure, params, null_term)
    if adx is not None:
        ax_dot = ax_dot + adx
    return x_dot, ax_dot


def _null(structure, params, w, d2, v, z, az, deficient):
    """(I - P) v = v - A^H W A z - D2 z with z = G^+ v, zero where G is invertible."""
    out = v - rmatmul(structure, params, _rows(w, az))
    if d2 is not None:
        out = out - d2.unsqueeze(-1) * z
    return deficient.to(out.dtype)[..., None, None] * out


def _null_of_g(plan, w, d2, c, g, x, ax, params, deficient):
    """n_g = (I - P) g; where c is present x is not G^+ g alone, and that is solved for."""
    if c is not None:
        x, ax, _ = solve(plan, w, d2, None, g, deficient, params)
    return _null(plan.structure, params, w, d2, g, x, ax, deficient)


def _deficiency(plan: Plan, info: Tensor, gate: Tensor | None) -> Tensor | None:
    """1 per problem that may lack full column rank; None where none can."""
    if plan.nonsingular or info.shape[-2] == 0:
        return None
    flag = info[..., 0, _SLOT_DEFICIENT]
    if gate is not None:
        flag = flag * gate
    return None if _is_zero(flag) else flag


def _is_zero(flag: Tensor) -> bool:
    """Whether the data under every transform is zero; False where data cannot be seen."""
    if torch.compiler.is_compiling() or torch.fx.experimental.proxy_tensor.get_proxy_mode():
        return False
    flag = flag.detach()
    while torch._C._functorch.is_functorch_wrapped_tensor(flag):
        flag = torch._C._functorch.get_unwrapped(flag)
    return not bool((flag != 0).any())


def _rows(w: Tensor | None, t: Tensor) -> Tensor:
    return t if w is None else w.unsqueeze(-1) * t


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _columns(blocks: list[Tensor]) -> Tensor:
    """Blocks of columns side by side, shared ones repeated over the batch."""
    lead = torch.broadcast_shapes(*(b.shape[:-2] for b in blocks))
    return torch.cat([b.expand(*lead, *b.shape[-2:]) for b in blocks], -1)


# ---------------------------------------------------------------------------------------------
# Forward mode inside forward mode.


def _nested_forward_mode():
    """Re-enable forward mode inside a ``jvp`` rule.

    torch switches it off there, and an outer level would silently lose every term that passes
    through the rule (pytorch issue 197867).
    """
    return fwAD._set_fwd_grad_enabled(True)


def _primals(ctx) -> list[Any]:
    """Saved tensors as this level's rule must see them: without this level's tangents."""
    return [None if t is None else fwAD.unpack_dual(t).primal for t in ctx.saved_tensors]
