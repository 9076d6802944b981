"""The structure of a matrix that is a JAX function: solved by LSMR inside the JAX program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from funclsq.jax.lsmr import lsmr
from funclsq.solution import Method, Status

__all__ = ["Function"]


@dataclasses.dataclass(frozen=True)
class Function:
    """Static half of a matrix-free operator; operands may carry a leading batch dimension.

    ``call(leaves, v)`` is A v for v (n,). ``inexact`` tells for each leaf whether it is one of the
    params (differentiable) or of the other operands, aux.
    """

    call: Any
    shape: tuple[int, int]
    param_ndims: tuple[int, ...]
    aux_ndims: tuple[int, ...]
    inexact: tuple[bool, ...]
    solves_in_jax = True
    layout = "operator"

    def _single(self, params, aux, v):
        given, other = iter(params), iter(aux)
        leaves = [next(given if yes else other) for yes in self.inexact]
        return self.call(leaves, v)

    def _adjoint(self, params, aux, u):
        example = jax.ShapeDtypeStruct((self.shape[1],), u.dtype)
        (out,) = jax.linear_transpose(lambda v: self._single(params, aux, v), example)(jnp.conj(u))
        return jnp.conj(out)

    def _block(self, single, rows, params, aux, v):
        """Run a function of one vector on a block of columns, and over the batch."""
        axes = tuple(0 if p.ndim > d else None for p, d in zip(params, self.param_ndims))
        batched = v.ndim == 3 or any(a is not None for a in axes)
        if 0 in v.shape[-2:]:
            sizes = [p.shape[0] for p, a in zip(params, axes) if a == 0]
            lead = v.shape[:-2] or tuple(sizes[:1])
            return jnp.zeros((*lead, rows, v.shape[-1]), v.dtype)
        f = jax.vmap(single, (None, None, -1), -1)
        if batched:
            f = jax.vmap(f, (axes, None, 0 if v.ndim == 3 else None))
        return f(params, aux, v)

    def mv(self, params, aux, v):
        """A v."""
        return self._block(self._single, self.shape[0], params, aux, v)

    def rmv(self, params, aux, u):
        """A^H u."""
        return self._block(self._adjoint, self.shape[1], params, aux, u)

    def fan_dot(self, params, params_dot, aux, blocks, terms):
        """+-A_dot v or +-A_dot^H u for each block, as its term says."""

        def fan(p):
            return [term.product(self, p, aux, t) for t, term in zip(blocks, terms)]

        return jax.jvp(fan, (params,), (params_dot,))[1]

    def solve(self, problem, ops):
        """Solve by LSMR on B = [W^(1/2) A; D]: x = B^+ ([W^(1/2) c; 0] + (B^H)^+ g)."""
        lead = self._lead(ops)
        rows = self.shape[0] if ops.d2 is None else sum(self.shape)
        mv, rmv = self._stacked(ops)
        o = problem.options
        settings = {"atol": o.atol, "btol": o.btol, "conlim": o.conlim, "maxiter": o.maxiter}

        def enter(t, size):
            t = jnp.broadcast_to(t, (*lead, *t.shape[-2:]))
            if ops.gate is not None:  # a zero right-hand side takes no step
                t = jnp.where(ops.gate[..., None, None] > 0, t, 0)
            return jnp.pad(t, [(0, 0)] * (t.ndim - 2) + [(0, size - t.shape[-2]), (0, 0)])

        total, runs = None, []
        if ops.c is not None:
            total = enter(ops.c if ops.w is None else jnp.sqrt(ops.w)[..., None] * ops.c, rows)
        if ops.g is not None:
            runs.append(lsmr(rmv, mv, enter(ops.g, self.shape[1]), **settings))
            total = runs[0].x if total is None else total + runs[0].x
        runs.append(lsmr(mv, rmv, total, **settings))
        x = runs[-1].x
        s = self.mv(ops.params, ops.aux, x)
        s = s if ops.c is None else s - ops.c
        deficient = _deficient(problem, ops, lead, jnp.finfo(x.dtype).dtype)
        return x, s, self._info(ops, x, s, runs, deficient), deficient

    def _lead(self, ops):
        """Batch shape of a solve."""
        pairs = [
            *zip(ops.params, self.param_ndims),
            (ops.w, 1),
            (ops.d2, 1),
            (ops.c, 2),
            (ops.g, 2),
        ]
        return next(((t.shape[0],) for t, d in pairs if t is not None and t.ndim > d), ())

    def _stacked(self, ops) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Products with B = [W^(1/2) A; D] and B^H."""
        m = self.shape[0]
        root = None if ops.w is None else jnp.sqrt(ops.w)[..., None]
        diagonal = None if ops.d2 is None else jnp.sqrt(ops.d2)[..., None]

        def mv(x):
            y = self.mv(ops.params, ops.aux, x)
            y = y if root is None else root * y
            return y if diagonal is None else jnp.concatenate([y, diagonal * x], -2)

        def rmv(y):
            top = y[..., :m, :]
            x = self.rmv(ops.params, ops.aux, top if root is None else root * top)
            return x if diagonal is None else x + diagonal * y[..., m:, :]

        return mv, rmv

    def _info(self, ops, x, s, runs, deficient):
        """Status, iterations, both residual norms, rank, condition, deficiency, method."""
        ws = s if ops.w is None else ops.w[..., None] * s
        normal = -self.rmv(ops.params, ops.aux, ws)
        if ops.g is not None:
            normal = normal + ops.g
        if ops.d2 is not None:
            normal = normal - ops.d2[..., None] * x
        residual = jnp.sqrt(jnp.maximum(jnp.real(jnp.conj(s) * ws).sum(-2), 0))
        columns = (
            _worst([run.status for run in runs]),
            sum(run.iterations for run in runs),
            residual,
            jnp.linalg.norm(normal, axis=-2),
            -1.0,
            runs[-1].cond,
            deficient[..., None],
            float(Method.lsmr),
        )
        shape, real = residual.shape, residual.dtype
        return jnp.stack([jnp.broadcast_to(jnp.asarray(t, real), shape) for t in columns], -1)


def _deficient(problem, ops, lead, real):
    """1 where the rank is not known to be full, which LSMR does not find out."""
    if problem.nonsingular:
        return jnp.zeros(lead, real)
    flag = jnp.ones(lead, real)
    if ops.d2 is not None:
        flag = jnp.where((ops.d2 > 0).all(-1), 0, flag)
    return flag if ops.gate is None else jnp.where(ops.gate > 0, flag, 0)


def _worst(codes):
    """Of several statuses the first that failed, else the last."""
    out = codes[-1]
    for code in codes[:-1]:
        bad = jnp.ones(code.shape, bool)
        for status in Status:
            if status.converged:
                bad = bad & (code != int(status))
        out = jnp.where(bad, code, out)
    return out
