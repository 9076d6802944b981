"""``vmap`` of the least-squares primitive.

Over c and g alone it appends columns (one problem, one solve); over anything else it gives the
operands a leading batch dimension. Index operands that differ by member are solved one by one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from funclsq.jax.problem import Operands, S, core_ndims, solve_p

__all__ = ["batch"]


def batch(args, dims, *, problem, has):
    """Solve for every member of a batch, as the rules of JAX want it."""
    A = problem.structure
    size = next(t.shape[d] for t, d in zip(args, dims) if d is not None)
    held = Operands.unflatten(A, has, dims)
    if any(d is not None for d in held.aux):  # other indices for each member: one by one
        return _one_by_one(args, dims, problem, has)
    if all(d is None for d in (*held.params, held.w, held.d2)):
        return _more_columns(size, Operands.unflatten(A, has, args), held, problem)
    return _more_members(size, args, dims, problem, has)


def _one_by_one(args, dims, problem, has):
    moved = [t if d is None else jnp.moveaxis(t, d, 0) for t, d in zip(args, dims)]
    mapped = [t for t, d in zip(moved, dims) if d is not None]

    def single(chosen):
        rest = iter(chosen)
        flat = [t if d is None else next(rest) for t, d in zip(moved, dims)]
        return tuple(solve_p.bind(*flat, problem=problem, has=has))

    return jax.lax.map(single, mapped), (0,) * len(problem.results)


def _more_columns(size, ops, dims, problem):
    """One problem: fold the mapped dimension of c and g into their columns.

    A mapped gate selects among results of that one problem, so it is applied to them.
    """
    fold = dims.c is not None or dims.g is not None
    c, g = ops.c, ops.g
    if fold:
        c, g = _fold(size, c, dims.c), _fold(size, g, dims.g)
    gate, gates = ops.gate, None
    if dims.gate is not None:
        gates = jnp.moveaxis(gate, dims.gate, 0)
        gate = gates.max(0)
    out = dict(zip(problem.results, S(problem, ops._replace(c=c, g=g, gate=gate))))
    unfolded = dict.fromkeys(out, fold)
    for name, axis in (("x", -1), ("s", -1), ("info", -2)):
        if fold and name in out:
            t = out[name]
            out[name] = jnp.moveaxis(_unfold(size, t, t.ndim + axis), t.ndim + axis, 0)
    unfolded["deficient"] = False  # a fact of the one matrix
    if gates is None:
        return list(out.values()), [0 if unfolded[name] else None for name in out]
    for name, t in out.items():
        ndim = t.ndim + (not unfolded[name])
        out[name] = jnp.where(_trailing(gates, ndim) > 0, t, 0)
    return list(out.values()), [0] * len(out)


def _trailing(gates: Any, ndim: int) -> Any:
    return gates.reshape(*gates.shape, *(1,) * (ndim - gates.ndim))


def _unfold(size, t, axis):
    return t.reshape(*t.shape[:axis], size, t.shape[axis] // size, *t.shape[axis + 1 :])


def _fold(size, t, dim):
    if t is None:
        return None
    if dim is None:
        t = jnp.broadcast_to(t[..., None, :], (*t.shape[:-1], size, t.shape[-1]))
    else:
        t = jnp.moveaxis(t, dim, -2)
    return t.reshape(*t.shape[:-2], t.shape[-2] * t.shape[-1])


def _more_members(size, args, dims, problem, has):
    """More problems: operands that differ get (or extend) a leading batch dimension."""
    cores = core_ndims(problem.structure, has)
    ndims = [t.ndim - (d is not None) for t, d in zip(args, dims)]
    inner = next(
        (
            jnp.moveaxis(t, d, 0).shape[1] if d is not None else t.shape[0]
            for t, d, n, core in zip(args, dims, ndims, cores)
            if n > core
        ),
        None,
    )
    flat = []
    for t, d, n, core in zip(args, dims, ndims, cores):
        if d is not None:
            t = jnp.moveaxis(t, d, 0)
        if inner is not None and (d is not None or n > core):
            if d is None:
                t = t[None]
            if n == core:
                t = t[:, None]
            tail = t.shape[2:]
            t = jnp.broadcast_to(t, (size, inner, *tail)).reshape(size * inner, *tail)
        flat.append(t)
    out = solve_p.bind(*flat, problem=problem, has=has)
    if inner is not None:
        out = [t.reshape(size, inner, *t.shape[1:]) for t in out]
    return out, (0,) * len(out)
