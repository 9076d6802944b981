"""Products with A of any structure, differentiable in everything, in every mode.

For sparse A: A v, A^H u and the sampled outer product P(u v^H); each is the derivative of the
others. A dense A is torch's own product, a matrix-free one its user's function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from funclsq import matrix_free
from funclsq.batching import vmap_sddmm, vmap_spmm
from funclsq.forward_mode import nested_forward_mode, primals, unrecorded
from funclsq.full_precision import in_full_precision
from funclsq.function import Function
from funclsq.opaque import sddmm_op, spmm_op
from funclsq.pattern import SparsityPattern

__all__ = ["matmul", "matmul_dot", "outer", "reduce_batch", "rmatmul", "rmatmul_dot"]


class _ReverseSpMM(Function):
    """A v, or A^H v, for sparse A: the face for torch.compile, which knows no jvp."""

    @staticmethod
    def forward(values, v, pattern, adjoint):
        return spmm_op(values, v, pattern.handle, adjoint)

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
            v_bar = reduce_batch(_spmm(values, out_bar, ctx.pattern, not ctx.adjoint), v)
        return values_bar, v_bar, None, None


class _SpMM(_ReverseSpMM):
    """A v, or A^H v, for sparse A, in every mode."""

    @staticmethod
    def jvp(ctx, values_dot, v_dot, *_):
        with nested_forward_mode():
            values, v = primals(ctx)
            out = None
            if values_dot is not None:
                out = _spmm(values_dot, v, ctx.pattern, ctx.adjoint)
            if v_dot is not None:
                part = _spmm(values, v_dot, ctx.pattern, ctx.adjoint)
                out = part if out is None else out + part
        return out

    @staticmethod
    def vmap(info, in_dims, values, v, pattern, adjoint):
        def call(values, v):
            return _spmm(values, v, pattern, adjoint)

        return vmap_spmm(info.batch_size, in_dims[:2], values, v, call), 0


class _ReverseSDDMM(Function):
    """sum_k U[row, k] conj(V[col, k]) at each entry, one row per batch member."""

    @staticmethod
    def forward(U, V, pattern):
        return sddmm_op(U, V, pattern.handle)

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
            U_bar = reduce_batch(_spmm(values_bar, V, ctx.pattern, False), U)
        if ctx.needs_input_grad[1]:
            V_bar = reduce_batch(_spmm(values_bar, U, ctx.pattern, True), V)
        return U_bar, V_bar, None


class _SDDMM(_ReverseSDDMM):
    """The sampled outer product in every mode."""

    @staticmethod
    def jvp(ctx, U_dot, V_dot, *_):
        with nested_forward_mode():
            U, V = primals(ctx)
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

        return vmap_sddmm(info.batch_size, in_dims[:2], U, V, call), 0


def _spmm(values: Tensor, v: Tensor, pattern: SparsityPattern, adjoint: bool) -> Tensor:
    if unrecorded():
        return spmm_op(values, v, pattern.handle, adjoint)
    face = _ReverseSpMM if torch.compiler.is_compiling() else _SpMM
    return face.apply(values, v, pattern, adjoint)


def _sddmm(pattern: SparsityPattern, U: Tensor, V: Tensor) -> Tensor:
    if unrecorded():
        return sddmm_op(U, V, pattern.handle)
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


def reduce_batch(t: Tensor, like: Tensor) -> Tensor:
    """Sum over the batch where the operand was shared by it."""
    return t.sum(0) if t.ndim > like.ndim else t


@in_full_precision
def matmul(structure: Any, params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """A v for a block of columns, (n, k) or (B, n, k)."""
    if structure.kind == "sparse":
        return _spmm(params[0], v, structure.pattern, False)
    if structure.kind == "dense":
        return params[0] @ v
    return matrix_free.apply(structure, params, v)


@in_full_precision
def rmatmul(structure: Any, params: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """A^H u for a block of columns, (m, k) or (B, m, k)."""
    if structure.kind == "sparse":
        return _spmm(params[0], u, structure.pattern, True)
    if structure.kind == "dense":
        return params[0].mH @ u
    return matrix_free.apply_adjoint(structure, params, u)


@in_full_precision
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


@in_full_precision
def matmul_dot(structure, params, params_dot, v):
    """Tangent of A v along params_dot."""
    if structure.kind != "matrix_free":
        return matmul(structure, params_dot, v)
    return matrix_free.push_params(lambda p: matrix_free.apply(structure, p, v), params, params_dot)


@in_full_precision
def rmatmul_dot(structure, params, params_dot, u):
    """Tangent of A^H u along params_dot."""
    if structure.kind != "matrix_free":
        return rmatmul(structure, params_dot, u)
    return matrix_free.push_params(
        lambda p: matrix_free.apply_adjoint(structure, p, u), params, params_dot
    )
