"""The one primitive of least squares for JAX, closed under every transform.

    S(A, w, d2; c, g) = (x, s, info, deficient),   x = G^+ (A^H W c + g),   s = A x - c,
    G = A^H W A + D2,   W = diag(w),   D2 = diag(d2).

It is linear in (c, g). Its tangent (derivation in ``funclsq.derivatives``), with r = -s,
n_g = (I - P) g, u = G^+ x, v = dA^H W A u and P = G^+ G, is

    dx = S(dc - dA x,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g)).x + (I - P) v

and ds the s of that solve, since W A (I - P) = 0. So there is one solve that depends on tangents,
and its transpose, S(-, k) again, is the one adjoint solve of reverse mode; and the products with
dA are one operation, so that its transpose is one too.
T(dA n_g), u and (I - P) v vanish where G is invertible; they are *gated*: S given a ``gate``
operand (the ``deficient`` of the problem, 0 or 1) returns zeros without a solve where it is 0, so
the rules are the same whether or not A is deficient, under ``jit`` and ``vmap`` too.

A problem names the ``results`` that somebody reads: each costs a buffer and a copy.

Transpose, for cotangents (k, k_s), without conjugation as JAX wants it: let
(z, az) = S(-; conj(k) + A^H conj(k_s)); then g_bar = conj(z) and c_bar = conj(W az) - k_s.

Its rules for ``vmap`` are in ``vmap_rules``, (I - P) v in ``nullspace``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from funclsq.jax.bridge import host_call
from funclsq.jax.host import HostSolve
from funclsq.jax.nullspace import null_part
from funclsq.jax.problem import RESULTS, Operands, Problem, S, core_ndims, solve_p
from funclsq.jax.rules import abstract, eager, given, no_tangent
from funclsq.jax.term import ADJOINT, FORWARD
from funclsq.jax.vmap_rules import batch
from funclsq.raw import INFO

__all__ = ["RESULTS", "Operands", "Problem", "S", "solve_p"]


def _results(flat, problem, has):
    """Shapes and dtypes of the results."""
    ops = Operands.unflatten(problem.structure, has, flat)
    m, n = problem.structure.shape
    some = ops.c if ops.c is not None else ops.g
    cores = core_ndims(problem.structure, has)
    lead = next(((t.shape[0],) for t, d in zip(flat, cores) if t.ndim > d), ())
    k = some.shape[-1]
    real = jnp.finfo(some.dtype).dtype
    every = {
        "x": ((*lead, n, k), some.dtype),
        "s": ((*lead, m, k), some.dtype),
        "info": ((*lead, k, INFO), real),
        "deficient": (lead, real),
    }
    return [every[name] for name in problem.results]


@solve_p.def_abstract_eval
def _abstract(*flat, problem, has):
    return [abstract(s, d, *flat) for s, d in _results(flat, problem, has)]


solve_p.def_impl(eager(solve_p))


def _lower(how, *flat, problem, has):
    ops = Operands.unflatten(problem.structure, has, flat)
    if problem.structure.solves_in_jax:
        every = dict(zip(RESULTS, problem.structure.solve(problem, ops)))
        return tuple(every[name] for name in problem.results)
    results = [jax.ShapeDtypeStruct(s, d) for s, d in _results(flat, problem, has)]
    return host_call(HostSolve(problem, has), results, flat, how or problem.how)


mlir.register_lowering(
    solve_p, mlir.lower_fun(functools.partial(_lower, None), multiple_results=True), platform="cpu"
)
mlir.register_lowering(
    solve_p, mlir.lower_fun(functools.partial(_lower, "pure_callback"), multiple_results=True)
)


# ---------------------------------------------------------------------------------------------
# Forward mode.


def _rows(w: Any, t: Any) -> Any:
    return t if w is None else w[..., None] * t


def _sum(terms: list[Any]) -> Any:
    return functools.reduce(lambda a, b: a + b, terms) if terms else None


def _jvp(primals, tangents, *, problem, has):
    A = problem.structure
    ops = Operands.unflatten(A, has, primals)
    dots = Operands.unflatten(A, has, tangents)
    wanted = {"x", "s", *problem.results, *(() if problem.nonsingular else ("deficient",))}
    names = tuple(name for name in RESULTS if name in wanted)
    found = dict(zip(names, S(problem, ops, *names)))
    x, s = found["x"], found["s"]
    deficient: Any = found.get("deficient")
    out = [found[name] for name in problem.results]
    still = [no_tangent(t) for t in out]
    derived = dataclasses.replace(problem, primary=False)
    params, aux, w, d2, _, g, gate = ops
    top, bottom, null, share = [], [], None, []
    if any(map(given, dots.params)):
        params_dot = tuple(map(ad.instantiate_zeros, dots.params))
        blocks, terms = [x, _rows(w, s)], [-FORWARD, -ADJOINT]
        if not problem.nonsingular:
            solve = functools.partial(_gated, derived, ops, deficient)
            blocks.append(_rows(w, solve("s", g=x)))
            terms.append(ADJOINT)
            if g is not None:
                n_g = g - A.rmv(params, aux, _rows(w, s)) - (0 if d2 is None else _rows(d2, x))
                blocks.append(jnp.where(deficient[..., None, None] > 0, n_g, 0))
                terms.append(FORWARD)
        c_dot, g_dot, *rest = A.fan_dot(params, params_dot, aux, blocks, terms)
        top.append(c_dot)
        bottom.append(g_dot)
        if rest:
            null = null_part(derived, ops._replace(c=None, g=rest[0], gate=deficient))
        if rest[1:]:
            bottom.append(solve("x", c=rest[1]))
    if given(dots.c):
        top.append(dots.c)
    if given(dots.g):
        bottom.append(dots.g)
    if given(dots.w):
        bottom.append(-A.rmv(params, aux, _rows(dots.w, s)))
    if given(dots.d2):
        share, g_dot = _damping_tangent(A, d2, dots.d2, g, x, s)
        top.extend(share)
        bottom.append(g_dot)
    if not top and not bottom:
        return out, still
    names = tuple(name for name in ("x", "s") if name in problem.results)
    if not names:
        return out, still
    rhs = Operands(params, aux, w, d2, _sum(top), _sum(bottom), gate)
    moved = dict(zip(names, S(dataclasses.replace(derived, results=names), rhs)))
    if null is not None and "x" in moved:
        moved["x"] = moved["x"] + null
    if "s" in moved:
        moved["s"] = _sum([moved["s"], *share])
    return out, [moved.get(name, zero) for name, zero in zip(problem.results, still)]


def _damping_tangent(A, d2, d2_dot, g, x, s):
    """What a tangent of d2 adds to c_dot (not to that in s), if anything, and to g_dot."""
    m, n = A.shape
    if g is not None or d2.shape[-1] != 1 or m >= n:
        return [], -_rows(d2_dot, x)
    positive = d2 > 0
    share = jnp.where(positive, d2_dot / jnp.where(positive, d2, 1), 0)
    return [_rows(share, s)], -_rows(jnp.where(positive, 0, d2_dot), x)


def _gated(problem, ops, gate, result, c=None, g=None):
    return S(problem, Operands(ops.params, ops.aux, ops.w, ops.d2, c, g, gate), result)


ad.primitive_jvps[solve_p] = _jvp


# ---------------------------------------------------------------------------------------------
# Reverse mode.


def _transpose(cts, *flat, problem, has):
    A = problem.structure
    ops = Operands.unflatten(A, has, flat)
    linear = [ad.is_undefined_primal(t) for t in flat]
    k, k_s = (dict(zip(problem.results, cts)).get(name) for name in ("x", "s"))
    bars: dict[str, Any] = {}
    if given(k) or given(k_s):
        params, aux, w, d2, c, g, gate = ops
        gk_s = k_s if gate is None or not given(k_s) else gate[..., None, None] * k_s
        terms = [jnp.conj(k)] if given(k) else []
        first = None
        if given(k_s) and _cancelling(A, w, d2):
            first = jnp.conj(k_s)
        elif given(k_s):
            terms.append(A.rmv(params, aux, jnp.conj(k_s)))
        names = [n for n, t in (("x", g), ("s", c)) if ad.is_undefined_primal(t)]
        adjoint = Operands(params, aux, w, d2, first, _sum(terms), gate)
        found = S(dataclasses.replace(problem, results=tuple(names)), adjoint)
        z, az = (dict(zip(names, found)).get(name) for name in ("x", "s"))
        if az is not None:
            waz = jnp.conj(_rows(w, az))
            bars["c"] = _reduce(waz - gk_s if given(k_s) and first is None else waz, c.aval)
        if z is not None:
            bars["g"] = _reduce(jnp.conj(z), g.aval)
    flat_bars = _named(A, has, bars)
    return [
        (ad.Zero(t.aval) if bar is None else bar) if is_linear else None
        for t, is_linear, bar in zip(flat, linear, flat_bars)
    ]


def _cancelling(A, w, d2):
    """Whether W A z - k_s, given as s by one solve, is better than a difference."""
    m, n = A.shape
    return w is None and d2 is not None and m < n


def _named(structure, has, bars):
    count = len(structure.param_ndims) + len(structure.aux_ndims)
    names = [name for name, present in zip(Operands._fields[2:], has) if present]
    return [None] * count + [bars.get(name) for name in names]


def _reduce(bar: Any, aval: Any) -> Any:
    """Sum over the batch where the operand was shared by it."""
    return bar.sum(0) if bar.ndim > len(aval.shape) else bar


ad.primitive_transposes[solve_p] = _transpose
batching.primitive_batchers[solve_p] = batch
