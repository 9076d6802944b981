"""Products with a sparse matrix of static pattern, as JAX primitives that call torch's kernels.

Two maps, linear in each operand, neither of them conjugating:

    fan(a; t_1, ..., t_p)       = (+-A t_i or +-A^T t_i)_i    one block of columns for each
    sddmm(u_1, v_1, u_2, ...)   = sum_i +-U_i V_i^T           at the stored entries

They are closed under differentiation. With y_bar_i for y_i = +-A v_i, and likewise for +-A^T u_i,

    fan:   a_bar = sum_i +-y_bar_i v_i^T + sum_j +-u_j y_bar_j^T     one sddmm
           v_bar_i = +-A^T y_bar_i,  u_bar_j = +-A y_bar_j           one fan
    sddmm: u_bar_i = +-A_bar v_i,  v_bar_i = +-A_bar^T u_i           one fan

so that a derivative rule with many products in it is few host calls, and XLA has nothing to add
up or negate between them: each small kernel of its own costs 25 ms to compile.

Operands either have no batch dimension or all have the same leading one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from funclsq.entries import sddmm as raw_sddmm
from funclsq.extent import largest
from funclsq.jax.bridge import host_call, mechanism
from funclsq.jax.rules import abstract, eager, given, no_tangent, vary
from funclsq.jax.term import ADJOINT, FORWARD, Term
from funclsq.operators import SparseStructure
from funclsq.pattern import SparsityPattern

__all__ = ["fan", "mv", "rmv", "sddmm"]


fan_p = Primitive("funclsq_sparse_fan")
fan_p.multiple_results = True
sddmm_p = Primitive("funclsq_sddmm")


def mv(pattern: SparsityPattern, values: Any, v: Any) -> Any:
    """A v; values (nnz,) or (B, nnz), v (n, k) or (B, n, k)."""
    return fan(pattern, values, (v,), (FORWARD,))[0]


def rmv(pattern: SparsityPattern, values: Any, u: Any) -> Any:
    """A^H u; values (nnz,) or (B, nnz), u (m, k) or (B, m, k)."""
    return fan(pattern, values, (u,), (ADJOINT,))[0]


def sddmm(pattern: SparsityPattern, u: Any, v: Any) -> Any:
    """sum_k u[row, k] v[col, k] at each stored entry; u (m, k), v (n, k) or with a leading B."""
    return sddmm_p.bind(*vary((u, v)), pattern=pattern, minus=(False,), how=mechanism(), lazy=False)


def fan(
    pattern: SparsityPattern,
    values: Any,
    blocks: Sequence[Any],
    terms: Sequence[Term],
    lazy: bool = False,
) -> list[Any]:
    """+-A v or +-A^H u for each block and its term; shapes as for :func:`mv` and :func:`rmv`.

    ``lazy``: a block of zeros gives zeros without a look at A, here and in every derivative. The
    rules of a solve multiply by zeros where A turns out to have full rank.
    """
    adjoint = [t.adjoint and jnp.iscomplexobj(values) for t in terms]
    blocks = [jnp.conj(t) if conj else t for t, conj in zip(blocks, adjoint)]
    batches = [t.shape[0] if t.ndim == 3 and values.ndim == 1 else None for t in blocks]
    if values.ndim == 2:
        blocks = [jnp.broadcast_to(t, (values.shape[0], *t.shape[-2:])) for t in blocks]
    blocks = [t if count is None else _folded(t) for t, count in zip(blocks, batches)]
    static = {"pattern": pattern, "terms": tuple(terms), "how": mechanism(), "lazy": lazy}
    out = fan_p.bind(*vary((values, *blocks)), **static)
    out = [t if count is None else _unfolded(t, count) for t, count in zip(out, batches)]
    return [jnp.conj(t) if conj else t for t, conj in zip(out, adjoint)]


def _folded(t: Any) -> Any:
    """One matrix for a whole batch of blocks: more columns."""
    batch, rows, k = t.shape
    return jnp.moveaxis(t, 0, 1).reshape(rows, batch * k)


def _unfolded(t: Any, batch: int) -> Any:
    return jnp.moveaxis(t.reshape(t.shape[0], batch, -1), 1, 0)


# ---------------------------------------------------------------------------------------------
# Products with A and its transpose.


def _fan_shapes(blocks, pattern, terms):
    m, n = pattern.shape
    return [
        (*t.shape[:-2], n if term.adjoint else m, t.shape[-1]) for t, term in zip(blocks, terms)
    ]


@fan_p.def_abstract_eval
def _fan_abstract(a, *blocks, pattern, terms, how, lazy):
    del how, lazy
    shapes = _fan_shapes(blocks, pattern, terms)
    return [abstract(shape, t.dtype, a, *blocks) for shape, t in zip(shapes, blocks)]


fan_p.def_impl(eager(fan_p))


def _fan_host(pattern, terms, lazy, outputs, inputs):
    a, *blocks = inputs
    op = SparseStructure(pattern).bind((a,))
    for term, out, t in zip(terms, outputs, blocks):
        if out.numel() == 0:
            continue
        if lazy and largest(t) == 0:
            out.zero_()
            continue
        if not term.adjoint:
            y = op.mv(t)
        elif t.is_complex():
            y = op.rmv(t.conj().resolve_conj()).conj()
        else:
            y = op.rmv(t)
        out.copy_(y)
        if term.minus:
            out.neg_()


def _fan_lower(a, *blocks, pattern, terms, how, lazy):
    shapes = _fan_shapes(blocks, pattern, terms)
    results = [jax.ShapeDtypeStruct(shape, t.dtype) for shape, t in zip(shapes, blocks)]
    return host_call(functools.partial(_fan_host, pattern, terms, lazy), results, (a, *blocks), how)


def _fan_jvp(primals, tangents, *, terms, **static):
    (a, *blocks), (a_dot, *dots) = primals, tangents
    out = fan_p.bind(*primals, terms=terms, **static)
    moved = [no_tangent(t) for t in out]
    if given(a_dot):
        moved = fan_p.bind(a_dot, *blocks, terms=terms, **static)
    some = [i for i, dot in enumerate(dots) if given(dot)]
    if some:
        chosen = tuple(terms[i] for i in some)
        parts = fan_p.bind(a, *(dots[i] for i in some), terms=chosen, **static)
        for i, part in zip(some, parts):
            moved[i] = moved[i] + part if given(a_dot) else part
    return out, moved


def _fan_transpose(cts, a, *blocks, terms, **static):
    if ad.is_undefined_primal(a):
        some = [i for i, ct in enumerate(cts) if given(ct)]
        pairs = [(blocks[i], cts[i]) if terms[i].adjoint else (cts[i], blocks[i]) for i in some]
        minus = tuple(terms[i].minus for i in some)
        back = (
            sddmm_p.bind(*(t for pair in pairs for t in pair), minus=minus, **static)
            if some
            else ad.Zero(a.aval)
        )
        return [back, *(None for _ in blocks)]
    linear = [ad.is_undefined_primal(t) for t in blocks]
    some = [i for i, ct in enumerate(cts) if linear[i] and given(ct)]
    chosen = tuple(terms[i].flipped() for i in some)
    parts = fan_p.bind(a, *(cts[i] for i in some), terms=chosen, **static) if some else []
    found = dict(zip(some, parts))
    back = [found.get(i, ad.Zero(t.aval)) if linear[i] else None for i, t in enumerate(blocks)]
    return [None, *back]


def _fan_batch(args, dims, **static):
    a, *blocks = args
    if dims[0] is not None:
        return _together(fan_p, 1, args, dims, static)
    out_dims = [None if d is None else t.ndim - 2 for t, d in zip(blocks, dims[1:])]
    # one matrix: more columns
    moved = [t if d is None else jnp.moveaxis(t, d, -2) for t, d in zip(blocks, dims[1:])]
    folded = [
        t if d is None else t.reshape(*t.shape[:-2], t.shape[-2] * t.shape[-1])
        for t, d in zip(moved, out_dims)
    ]
    out = fan_p.bind(a, *folded, **static)
    out = [
        y if d is None else y.reshape(*y.shape[:-1], *t.shape[-2:])
        for y, t, d in zip(out, moved, out_dims)
    ]
    return out, out_dims


# ---------------------------------------------------------------------------------------------
# Sampled outer products.


@sddmm_p.def_abstract_eval
def _sddmm_abstract(*blocks, pattern, minus, how, lazy):
    del minus, how, lazy
    return abstract((*blocks[0].shape[:-2], pattern.nnz), blocks[0].dtype, *blocks)


sddmm_p.def_impl(eager(sddmm_p))


def _sddmm_host(pattern, minus, lazy, outputs, inputs):
    (out,) = outputs
    if out.numel() == 0:
        return
    pairs = [
        (u, v.conj().neg() if negative else v.conj())
        for u, v, negative in zip(inputs[::2], inputs[1::2], minus)
        if not (lazy and (largest(u) == 0 or largest(v) == 0))
    ]
    if not pairs:
        out.zero_()
        return
    u, v = pairs[0] if len(pairs) == 1 else (torch.cat(side, -1) for side in zip(*pairs))
    out.copy_(raw_sddmm(pattern, u, v, batched=u.ndim == 3))


def _sddmm_lower(*blocks, pattern, minus, how, lazy):
    shape = (*blocks[0].shape[:-2], pattern.nnz)
    result = jax.ShapeDtypeStruct(shape, blocks[0].dtype)
    host = functools.partial(_sddmm_host, pattern, minus, lazy)
    return host_call(host, (result,), blocks, how)


def _sddmm_jvp(primals, tangents, *, minus, **static):
    out = sddmm_p.bind(*primals, minus=minus, **static)
    operands, signs = [], []
    for i, dot in enumerate(tangents):
        if given(dot):
            other = primals[i ^ 1]
            operands += [other, dot] if i % 2 else [dot, other]
            signs.append(minus[i // 2])
    if not operands:
        return out, no_tangent(out)
    return out, sddmm_p.bind(*operands, minus=tuple(signs), **static)


def _sddmm_transpose(ct, *blocks, minus, **static):
    linear = [i for i, t in enumerate(blocks) if ad.is_undefined_primal(t)]
    back: list[Any] = [None] * len(blocks)
    if not given(ct):
        parts = [ad.Zero(blocks[i].aval) for i in linear]
    else:
        terms = tuple(Term(bool(i % 2), minus[i // 2]) for i in linear)
        parts = fan_p.bind(ct, *(blocks[i ^ 1] for i in linear), terms=terms, **static)
    for i, part in zip(linear, parts):
        back[i] = part
    return back


def _sddmm_batch(args, dims, **static):
    (out,), (dim,) = _together(sddmm_p, 2, args, dims, static)
    return out, dim


# ---------------------------------------------------------------------------------------------
# What both share.


def _together(primitive, core, args, dims, static):
    """Give every operand a leading batch dimension; a second one is merged with the first."""
    size = next(t.shape[d] for t, d in zip(args, dims) if d is not None)
    args = [
        jnp.broadcast_to(t, (size, *t.shape)) if d is None else jnp.moveaxis(t, d, 0)
        for t, d in zip(args, dims)
    ]
    nested = args[0].ndim == core + 2
    if nested:
        inner = args[0].shape[1]
        args = [t.reshape(-1, *t.shape[2:]) for t in args]
    out = primitive.bind(*args, **static)
    out = out if primitive.multiple_results else [out]
    if nested:
        out = [t.reshape(size, inner, *t.shape[1:]) for t in out]
    return out, [0] * len(out)


def _register(primitive, lower, jvp, transpose, batch):
    def elsewhere(*args, **static):
        return lower(*args, **{**static, "how": "pure_callback"})

    for function, platform in ((lower, "cpu"), (elsewhere, None)):
        rule = function if primitive.multiple_results else _first(function)
        rule = mlir.lower_fun(rule, multiple_results=primitive.multiple_results)
        mlir.register_lowering(primitive, rule, platform=platform)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch


def _first(function):
    return lambda *args, **static: function(*args, **static)[0]


_register(fan_p, _fan_lower, _fan_jvp, _fan_transpose, _fan_batch)
_register(sddmm_p, _sddmm_lower, _sddmm_jvp, _sddmm_transpose, _sddmm_batch)
