"""Products with a sparse matrix of static pattern, as JAX primitives that call torch's kernels.

Three maps, each bilinear and none of them conjugating, closed under transposition:

    mv(a, v)    = A v           (m, k)
    tmv(a, u)   = A^T u         (n, k)
    sddmm(u, v) = U V^T at the stored entries, one value per entry

    mv:    v_bar = tmv(a, y_bar),   a_bar = sddmm(y_bar, v)
    tmv:   u_bar = mv(a, y_bar),    a_bar = sddmm(u, y_bar)
    sddmm: u_bar = mv(a_bar, v),    v_bar = tmv(a_bar, u)

One primitive carries the three; ``kind`` tells which. Operands either have no batch dimension or
both have the same leading one.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from funclsq.entries import sddmm as raw_sddmm
from funclsq.extent import largest
from funclsq.jax.bridge import host_call, mechanism
from funclsq.jax.rules import abstract, eager, no_tangent, vary
from funclsq.operators import SparseStructure
from funclsq.pattern import SparsityPattern

__all__ = ["mv", "rmv", "sddmm"]

product_p = Primitive("funclsq_sparse_product")


def mv(pattern: SparsityPattern, values: Any, v: Any, lazy: bool = False) -> Any:
    """A v; values (nnz,) or (B, nnz), v (n, k) or (B, n, k).

    ``lazy``: a v of zeros gives zeros without a look at A, here and in every derivative. The
    rules of a solve multiply by zeros where A turns out to have full rank.
    """
    return _matrix_product("mv", pattern, values, v, lazy)


def rmv(pattern: SparsityPattern, values: Any, u: Any, lazy: bool = False) -> Any:
    """A^H u; values (nnz,) or (B, nnz), u (m, k) or (B, m, k)."""
    if jnp.iscomplexobj(values):
        return jnp.conj(_matrix_product("tmv", pattern, values, jnp.conj(u), lazy))
    return _matrix_product("tmv", pattern, values, u, lazy)


def sddmm(pattern: SparsityPattern, u: Any, v: Any) -> Any:
    """sum_k u[row, k] v[col, k] at each stored entry; u (m, k), v (n, k) or with a leading B."""
    return product_p.bind(*vary((u, v)), pattern=pattern, kind="sddmm", how=mechanism(), lazy=False)


def _matrix_product(kind: str, pattern: SparsityPattern, values: Any, v: Any, lazy: bool) -> Any:
    bind = functools.partial(product_p.bind, pattern=pattern, kind=kind, how=mechanism(), lazy=lazy)
    if values.ndim == 1 and v.ndim == 3:  # one matrix: fold the batch into columns
        batch, rows, k = v.shape
        folded = jnp.moveaxis(v, 0, 1).reshape(rows, batch * k)
        out = bind(*vary((values, folded)))
        return jnp.moveaxis(out.reshape(-1, batch, k), 1, 0)
    if values.ndim == 2 and v.ndim == 2:
        v = jnp.broadcast_to(v, (values.shape[0], *v.shape))
    return bind(*vary((values, v)))


def _shape(a: Any, v: Any, pattern: SparsityPattern, kind: str) -> tuple[int, ...]:
    m, n = pattern.shape
    if kind == "sddmm":
        return (*a.shape[:-2], pattern.nnz)
    return (*v.shape[:-2], m if kind == "mv" else n, v.shape[-1])


@product_p.def_abstract_eval
def _abstract(a, v, *, pattern, kind, how, lazy):
    del how, lazy
    return abstract(_shape(a, v, pattern, kind), v.dtype, a, v)


product_p.def_impl(eager(product_p))


def _host(pattern, kind, lazy, outputs, inputs):
    (out,), (a, v) = outputs, inputs
    if out.numel() == 0:
        return
    if lazy and (largest(v) == 0 or (kind == "sddmm" and largest(a) == 0)):
        out.zero_()
        return
    if kind == "sddmm":
        out.copy_(raw_sddmm(pattern, a, v.conj(), batched=a.ndim == 3))
        return
    op = SparseStructure(pattern).bind((a,))
    if kind == "mv":
        out.copy_(op.mv(v))
    elif v.is_complex():
        out.copy_(op.rmv(v.conj().resolve_conj()).conj())
    else:
        out.copy_(op.rmv(v))


def _lower(a, v, *, pattern, kind, how, lazy):
    result = jax.ShapeDtypeStruct(_shape(a, v, pattern, kind), v.dtype)
    return host_call(functools.partial(_host, pattern, kind, lazy), (result,), (a, v), how)[0]


def _lower_elsewhere(a, v, **static):
    return _lower(a, v, **{**static, "how": "pure_callback"})


mlir.register_lowering(product_p, mlir.lower_fun(_lower, multiple_results=False), platform="cpu")
mlir.register_lowering(product_p, mlir.lower_fun(_lower_elsewhere, multiple_results=False))


def _jvp(primals, tangents, **static):
    out = product_p.bind(*primals, **static)
    total = None
    for i, dot in enumerate(tangents):
        if not isinstance(dot, ad.Zero):
            operands = [*primals]
            operands[i] = dot
            term = product_p.bind(*operands, **static)
            total = term if total is None else total + term
    return out, no_tangent(out) if total is None else total


ad.primitive_jvps[product_p] = _jvp


def _transpose(ct, a, v, *, kind, **static):
    if isinstance(ct, ad.Zero):
        return [
            ad.Zero(t.aval) if ad.is_undefined_primal(t) else None  # nothing flows back
            for t in (a, v)
        ]
    bind = functools.partial(product_p.bind, **static)
    if ad.is_undefined_primal(a):
        back = {
            "mv": lambda: bind(ct, v, kind="sddmm"),
            "tmv": lambda: bind(v, ct, kind="sddmm"),
            "sddmm": lambda: bind(ct, v, kind="mv"),
        }[kind]()
        return [back, None]
    back = {
        "mv": lambda: bind(a, ct, kind="tmv"),
        "tmv": lambda: bind(a, ct, kind="mv"),
        "sddmm": lambda: bind(ct, a, kind="tmv"),
    }[kind]()
    return [None, back]


ad.primitive_transposes[product_p] = _transpose


def _batch(args, dims, *, kind, **static):
    a, v = args
    size = next(t.shape[d] for t, d in zip(args, dims) if d is not None)
    bind = functools.partial(product_p.bind, kind=kind, **static)
    if kind != "sddmm" and dims[0] is None:  # one matrix: more columns
        v = jnp.moveaxis(v, dims[1], -2)
        out = bind(a, v.reshape(*v.shape[:-2], -1))
        return out.reshape(*out.shape[:-1], size, -1), out.ndim - 1
    a, v = (
        jnp.broadcast_to(t, (size, *t.shape)) if d is None else jnp.moveaxis(t, d, 0)
        for t, d in zip((a, v), dims)
    )
    core = 2 if kind == "sddmm" else 1
    if a.ndim == core + 1:
        return bind(a, v), 0
    inner = a.shape[1]
    out = bind(a.reshape(-1, *a.shape[2:]), v.reshape(-1, *v.shape[2:]))
    return out.reshape(size, inner, *out.shape[1:]), 0


batching.primitive_batchers[product_p] = _batch
