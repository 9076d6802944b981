"""The part of a block of columns that a solve cannot see, as a primitive of its own.

    N v = (I - P) v,   P = G^+ G,   G = A^H W A + D2,

and zeros where the gate is 0, that is where G is invertible. One projection leaves eps cond^2 |v|
of the range behind, so it is made twice. N is its own adjoint. As one primitive it is one host call
where products, solves and differences between them would be eight operations of the program; its
derivatives in A, W and D2, and its batches, are those of these operations.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from funclsq.jax.bridge import host_call
from funclsq.jax.host import HostNull
from funclsq.jax.problem import Operands, Problem, S
from funclsq.jax.rules import abstract, eager, given, no_tangent, vary

__all__ = ["null_part"]

null_p = Primitive("funclsq_null_part")


def null_part(problem: Problem, ops: Operands) -> Any:
    """N v for v, (n, k) or (B, n, k), which is the g of the operands; their c is absent."""
    if problem.structure.solves_in_jax:
        return _in_steps(problem, ops)
    flat, has = ops.flatten()
    return null_p.bind(*vary(flat), problem=problem, has=has)


def _in_steps(problem: Problem, ops: Operands) -> Any:
    """The same as products and solves."""
    A, d2, v = problem.structure, ops.d2, ops.g
    for _ in range(2):
        image = A.mv(ops.params, ops.aux, v)
        g = None if d2 is None else d2[..., None] * v
        v = v - S(problem, ops._replace(c=image, g=g), "x")
    return jnp.where(ops.gate[..., None, None] > 0, v, 0)


def _steps(problem, has, flat):
    return _in_steps(problem, Operands.unflatten(problem.structure, has, flat))


@null_p.def_abstract_eval
def _abstract(*flat, problem, has):
    v = Operands.unflatten(problem.structure, has, flat).g
    return abstract(v.shape, v.dtype, *flat)


null_p.def_impl(eager(null_p))


def _lower(how, *flat, problem, has):
    v = Operands.unflatten(problem.structure, has, flat).g
    result = jax.ShapeDtypeStruct(v.shape, v.dtype)
    return host_call(HostNull(problem, has), (result,), flat, how or problem.how)[0]


mlir.register_lowering(
    null_p, mlir.lower_fun(functools.partial(_lower, None), multiple_results=False), platform="cpu"
)
mlir.register_lowering(
    null_p, mlir.lower_fun(functools.partial(_lower, "pure_callback"), multiple_results=False)
)


def _jvp(primals, tangents, *, problem, has):
    ops = Operands.unflatten(problem.structure, has, primals)
    dots = Operands.unflatten(problem.structure, has, tangents)
    if any(map(given, (*dots.params, dots.w, dots.d2))):
        moving = [i for i, dot in enumerate(tangents) if given(dot)]

        def steps(*chosen):
            flat = dict(enumerate(primals)) | dict(zip(moving, chosen))
            return _steps(problem, has, list(flat.values()))

        return jax.jvp(steps, [primals[i] for i in moving], [tangents[i] for i in moving])
    out = null_p.bind(*primals, problem=problem, has=has)
    if not given(dots.g):
        return out, no_tangent(out)
    return out, null_part(problem, ops._replace(g=dots.g))


def _transpose(ct, *flat, problem, has):
    ops = Operands.unflatten(problem.structure, has, flat)
    back = ad.Zero(ops.g.aval)
    if given(ct):
        back = jnp.conj(null_part(problem, ops._replace(g=jnp.conj(ct))))
    return [back if ad.is_undefined_primal(t) else None for t in flat]


def _batch(args, dims, *, problem, has):
    return jax.vmap(lambda *flat: _steps(problem, has, flat), dims)(*args), 0


ad.primitive_jvps[null_p] = _jvp
ad.primitive_transposes[null_p] = _transpose
batching.primitive_batchers[null_p] = _batch
