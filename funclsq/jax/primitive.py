"""The one primitive of least squares for JAX, closed under every transform.

    S(A, w, d2; c, g) = (x, s, info, deficient),   x = G^+ (A^H W c + g),   s = A x - c,
    G = A^H W A + D2,   W = diag(w),   D2 = diag(d2).

It is linear in (c, g). Its tangent (derivation in ``funclsq.derivatives``), with r = -s,
n_g = (I - P) g, u = G^+ x, v = dA^H W A u and P = G^+ G, is

    dx = S(dc - dA x,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g)).x + (I - P) v
       = S(dc - dA x - A v,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g) - D2 v).x + v,

the second line because P v = G^+ (A^H W A v + D2 v) is itself a value of S; ds is the s of that
solve. So there is one
solve that depends on tangents, and its transpose, S(-, k) again, is the one adjoint solve of
reverse mode. T(dA n_g) and u vanish where G is invertible; they are *gated*: S given a ``gate``
operand (the ``deficient`` of the problem, 0 or 1) returns zeros without a solve where it is 0, so
the rules are the same whether or not A is deficient, under ``jit`` and ``vmap`` too.

A problem names the ``results`` that somebody reads: each costs a buffer and a copy.

Transpose, for cotangents (k, k_s), without conjugation as JAX wants it: let
(z, az) = S(-; conj(k) + A^H conj(k_s)); then g_bar = conj(z) and c_bar = conj(W az) - k_s.

Its rules for ``vmap`` are in ``vmap_rules``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from funclsq.jax.bridge import host_call
from funclsq.jax.host import HostSolve
from funclsq.jax.rules import abstract, eager, no_tangent, vary
from funclsq.methods._protocol import Options
from funclsq.raw import INFO

__all__ = ["RESULTS", "Operands", "Problem", "S", "core_ndims", "solve_p"]

RESULTS = ("x", "s", "info", "deficient")

solve_p = Primitive("funclsq_lstsq")
solve_p.multiple_results = True


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a solve."""

    structure: Any
    options: Options
    full_rank: bool = False  # A is known to have full column rank
    damped: bool = False  # damp > 0 is known
    on_failure: str = "ignore"
    check_finite: bool = True
    compute_dtype: str | None = None
    how: str = "buffer_callback"
    residuals: bool = True  # somebody may read the residual norms
    primary: bool = False  # the solve that was asked for, not one that a derivative needs
    results: tuple[str, ...] = RESULTS

    @property
    def nonsingular(self) -> bool:
        """Whether G is known to be invertible before anything is computed."""
        return self.full_rank or self.damped


class Operands(NamedTuple):
    """What a solve depends on; absent ones are None."""

    params: tuple[Any, ...]
    aux: tuple[Any, ...]
    w: Any = None
    d2: Any = None
    c: Any = None
    g: Any = None
    gate: Any = None

    def flatten(self) -> tuple[list[Any], tuple[bool, ...]]:
        """Present operands in order, and which of the optional five are present."""
        optional = self[2:]
        has = tuple(t is not None for t in optional)
        return [*self.params, *self.aux, *(t for t in optional if t is not None)], has

    @classmethod
    def unflatten(cls, structure: Any, has: tuple[bool, ...], flat: Any) -> Operands:
        """Inverse of :meth:`flatten`."""
        a = len(structure.param_ndims)
        b = a + len(structure.aux_ndims)
        rest = iter(flat[b:])
        optional = (next(rest) if present else None for present in has)
        return cls(tuple(flat[:a]), tuple(flat[a:b]), *optional)


def S(problem: Problem, operands: Operands, *results: str) -> Any:
    """Apply the primitive; the results named (by default those of the problem), one bare."""
    if results:
        problem = dataclasses.replace(problem, results=results)
    flat, has = operands.flatten()
    out = solve_p.bind(*vary(flat), problem=problem, has=has)
    return out[0] if len(results) == 1 else tuple(out)


def core_ndims(structure: Any, has: tuple[bool, ...]) -> list[int]:
    """Dimensions of the operands present, without a batch."""
    optional = (d for d, present in zip((1, 1, 2, 2, 0), has) if present)
    return [*structure.param_ndims, *structure.aux_ndims, *optional]


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


def _given(dot: Any) -> bool:
    return dot is not None and not isinstance(dot, ad.Zero)


def _sum(terms: list[Any]) -> Any:
    return functools.reduce(lambda a, b: a + b, terms) if terms else None


def _jvp(primals, tangents, *, problem, has):
    A = problem.structure
    ops = Operands.unflatten(A, has, primals)
    dots = Operands.unflatten(A, has, tangents)
    every = x, s, _, deficient = S(problem, ops, *RESULTS)
    out = [every[RESULTS.index(name)] for name in problem.results]
    still = [no_tangent(t) for t in out]
    derived = dataclasses.replace(problem, primary=False)
    params, aux, w, d2, _, g, gate = ops
    top, bottom, outside, share = [], [], [], []
    if any(map(_given, dots.params)):
        params_dot = tuple(map(ad.instantiate_zeros, dots.params))
        top.append(-A.mv_dot(params, params_dot, aux, x))
        bottom.append(-A.rmv_dot(params, params_dot, aux, _rows(w, s)))
        if not problem.nonsingular:
            solve = functools.partial(_gated, derived, ops, deficient)
            if g is not None:
                n_g = g - A.rmv(params, aux, _rows(w, s)) - (0 if d2 is None else _rows(d2, x))
                n_g = jnp.where(deficient[..., None, None] > 0, n_g, 0)
                bottom.append(solve("x", c=A.mv_dot(params, params_dot, aux, n_g)))
            au = solve("s", g=x)
            v = A.rmv_dot(params, params_dot, aux, _rows(w, au))
            # One projection leaves eps cond^2 |v| of the range behind; the main solve makes
            # the second.
            image = A.mv(params, aux, v)
            v = v - solve("x", c=image, g=None if d2 is None else _rows(d2, v))
            top.append(-A.mv(params, aux, v))
            if d2 is not None:
                bottom.append(-_rows(d2, v))
            outside.append(v)
    if _given(dots.c):
        top.append(dots.c)
    if _given(dots.g):
        bottom.append(dots.g)
    if _given(dots.w):
        bottom.append(-A.rmv(params, aux, _rows(dots.w, s)))
    if _given(dots.d2):
        share, rest = _damping_tangent(A, d2, dots.d2, g, x, s)
        top.extend(share)
        bottom.append(rest)
    if not top and not bottom:
        return out, still
    names = [name for name in ("x", "s") if name in problem.results]
    if not names:
        return out, still
    rhs = Operands(params, aux, w, d2, _sum(top), _sum(bottom), gate)
    moved = dict(zip(names, S(dataclasses.replace(derived, results=tuple(names)), rhs)))
    if "x" in moved:
        moved["x"] = _sum([moved["x"], *outside])
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
    if _given(k) or _given(k_s):
        params, aux, w, d2, c, g, gate = ops
        gk_s = k_s if gate is None or not _given(k_s) else gate[..., None, None] * k_s
        terms = [jnp.conj(k)] if _given(k) else []
        first = None
        if _given(k_s) and _cancelling(A, w, d2):
            first = jnp.conj(k_s)
        elif _given(k_s):
            terms.append(A.rmv(params, aux, jnp.conj(k_s)))
        names = [n for n, t in (("x", g), ("s", c)) if ad.is_undefined_primal(t)]
        adjoint = Operands(params, aux, w, d2, first, _sum(terms), gate)
        found = S(dataclasses.replace(problem, results=tuple(names)), adjoint)
        z, az = (dict(zip(names, found)).get(name) for name in ("x", "s"))
        if az is not None:
            waz = jnp.conj(_rows(w, az))
            bars["c"] = _reduce(waz - gk_s if _given(k_s) and first is None else waz, c.aval)
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
