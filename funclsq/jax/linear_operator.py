"""A matrix that is only a JAX function: solved by LSMR inside the JAX program."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from funclsq.jax.lsmr import lsmr
from funclsq.raw import INFO
from funclsq.solution import Method, Status

__all__ = ["Function", "LinearOperator"]


@jax.tree_util.register_pytree_node_class
class LinearOperator:
    """A x given by a JAX function that is linear in x: v -> matvec(params, v).

    Differentiable in ``params`` and in whatever traced arrays ``matvec`` closes over. Solved by
    LSMR written in ``jax.lax``, on any device and without a host call.

    Parameters
    ----------
    matvec : callable
        ``matvec(params, v)`` with v of shape (n,); returns A v, of shape (m,).
    shape : tuple of int
        ``(m, n)``.
    params : pytree of arrays
        What the entries of A depend on.

    Notes
    -----
    Keep ``matvec`` one object (a function defined once, not a fresh lambda at each call): programs
    are compiled once per object. A^H comes from ``jax.linear_transpose``. For rank-deficient A a
    gradient costs more solves; ``rank="full"`` says that it is not. Columns are not scaled, as
    their norms are not known: scale them in ``matvec`` where they differ much.

    Examples
    --------
    >>> import jax.numpy as jnp, funclsq.jax as flj
    >>> t = jnp.linspace(0, 1, 5)
    >>> def matvec(rate, v):
    ...     return v[0] * jnp.exp(-rate * t) + v[1]
    >>> A = flj.LinearOperator(matvec, (5, 2), jnp.asarray(2.0))
    >>> flj.lstsq(A, 3 * jnp.exp(-2 * t) + 1).round(3)
    Array([3., 1.], dtype=float32)
    """

    def __init__(
        self, matvec: Callable[[Any, Any], Any], shape: tuple[int, int], params: Any = ()
    ) -> None:
        if not callable(matvec):
            raise TypeError(f"LinearOperator: matvec must be callable; got {type(matvec)}.")
        m, n = (int(s) for s in shape)
        self.matvec, self.shape, self.params = matvec, (m, n), params

    def tree_flatten(self) -> tuple[tuple[Any], Any]:
        """Split into leaves and static part."""
        return (self.params,), (self.matvec, self.shape)

    @classmethod
    def tree_unflatten(cls, static: Any, leaves: tuple[Any]) -> LinearOperator:
        """Inverse of tree_flatten."""
        out = object.__new__(cls)
        (out.matvec, out.shape), (out.params,) = static, leaves
        return out

    def __repr__(self) -> str:
        return f"LinearOperator(shape={self.shape})"

    def funclsq_structure(self, dtype: Any) -> tuple[Function, tuple[Any, ...], tuple[Any, ...]]:
        """Split into structure, differentiable parameters and the other operands."""
        leaves, tree = jax.tree.flatten(self.params)
        leaves = [jnp.asarray(t) for t in leaves]
        example = jax.ShapeDtypeStruct((self.shape[1],), dtype)
        hoisted = _hoist(self.matvec, tree, leaves, example)
        if hoisted is not None:
            function, leaves = hoisted
            call: Any = _Closed(function)
        else:
            call = _Open(self.matvec, tree)
        inexact = tuple(bool(jnp.issubdtype(t.dtype, jnp.inexact)) for t in leaves)
        params = tuple(t for t, yes in zip(leaves, inexact) if yes)
        aux = tuple(t for t, yes in zip(leaves, inexact) if not yes)
        ndims = tuple(t.ndim for t in params), tuple(t.ndim for t in aux)
        result = jax.eval_shape(lambda v: call(leaves, v), example)
        if result.shape != (self.shape[0],):
            raise ValueError(
                f"LinearOperator: for an input of shape {example.shape} matvec must return shape "
                f"{(self.shape[0],)}; got {result.shape}."
            )
        if result.dtype != dtype:
            raise TypeError(
                f"LinearOperator: for an input of {example.dtype} matvec must return that dtype; "
                f"got {result.dtype}."
            )
        return Function(call, self.shape, ndims[0], ndims[1], inexact), params, aux


@dataclasses.dataclass(frozen=True)
class _Open:
    """A user's function of (params, v) as one of (leaves, v)."""

    matvec: Any
    tree: Any

    def __call__(self, leaves: Any, v: Any) -> Any:
        return self.matvec(jax.tree.unflatten(self.tree, leaves), v)


@dataclasses.dataclass(frozen=True, eq=False)
class _Closed:
    """A traced function whose closed-over arrays have become leaves."""

    function: Any

    def __call__(self, leaves: Any, v: Any) -> Any:
        return self.function(*leaves, v)


_plain: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def _hoist(matvec: Any, tree: Any, leaves: list[Any], example: Any) -> Any:
    """Turn tracers that matvec closes over into leaves; None if there are none."""
    key = (tree, tuple((t.shape, t.dtype) for t in leaves), example.dtype)
    try:
        seen = _plain.setdefault(matvec, set())
    except TypeError:  # not weakly referable
        seen = set()
    if key in seen:
        return None
    call = _Open(matvec, tree)
    traced = jax.make_jaxpr(lambda leaves, v: call(leaves, v))(leaves, example)
    if not any(isinstance(c, jax.core.Tracer) for c in traced.consts):
        seen.add(key)
        return None
    consts = [jnp.asarray(c) for c in traced.consts]
    closed = jax.make_jaxpr(
        lambda *args: jax.core.eval_jaxpr(traced.jaxpr, args[: len(consts)], *args[len(consts) :])[
            0
        ]
    )(*consts, *leaves, example)
    function = jaxpr_as_fun(closed)
    return (lambda *args: function(*args)[0]), [*consts, *leaves]


@dataclasses.dataclass(frozen=True)
class Function:
    """Structure of a matrix-free operator; operands may carry a leading batch dimension."""

    call: Any
    shape: tuple[int, int]
    param_ndims: tuple[int, ...]
    aux_ndims: tuple[int, ...]
    inexact: tuple[bool, ...]
    solves_in_jax = True
    layout = "operator"

    def _single(self, params, aux, v):
        sources = iter(params), iter(aux)
        leaves = [next(sources[0] if yes else sources[1]) for yes in self.inexact]
        return self.call(leaves, v)

    def _transposed(self, params, aux, u):
        n = self.shape[1]
        example = jax.ShapeDtypeStruct((n,), u.dtype)
        (out,) = jax.linear_transpose(lambda v: self._single(params, aux, v), example)(jnp.conj(u))
        return jnp.conj(out)

    def _block(self, single, params, aux, v):
        f = jax.vmap(single, (None, None, -1), -1)
        if v.shape[-1] == 0:
            rows = self.shape[0] if single == self._single else self.shape[1]
            return jnp.zeros((*v.shape[:-2], rows, 0), v.dtype)
        axes = tuple(0 if p.ndim > d else None for p, d in zip(params, self.param_ndims))
        if v.ndim == 3 or any(a is not None for a in axes):
            f = jax.vmap(f, (axes, None, 0 if v.ndim == 3 else None))
        return f(params, aux, v)

    def mv(self, params, aux, v):
        """A v."""
        return self._block(self._single, params, aux, v)

    def rmv(self, params, aux, u):
        """A^H u."""
        return self._block(self._transposed, params, aux, u)

    def mv_dot(self, params, params_dot, aux, v):
        """A_dot v."""
        return jax.jvp(lambda p: self.mv(p, aux, v), (params,), (params_dot,))[1]

    def rmv_dot(self, params, params_dot, aux, u):
        """A_dot^H u."""
        return jax.jvp(lambda p: self.rmv(p, aux, u), (params,), (params_dot,))[1]

    def solve(self, problem, ops):
        """Solve by LSMR on B = [W^(1/2) A; D]: x = B^+ ([W^(1/2) c; 0] + (B^H)^+ g)."""
        params, aux, w, d2, c, g, gate = ops
        m, n = self.shape
        some = c if c is not None else g
        real = jnp.finfo(some.dtype).dtype
        sizes = (p.shape[0] for p, d in zip(params, self.param_ndims) if p.ndim > d)
        sizes = (*sizes, *(t.shape[0] for t in (w, d2) if t is not None and t.ndim == 2))
        sizes = (*sizes, *(t.shape[0] for t in (c, g) if t is not None and t.ndim == 3))
        lead = sizes[:1]
        root = None if w is None else jnp.sqrt(w)[..., None]
        diagonal = None if d2 is None else jnp.sqrt(d2)[..., None]

        def mv(x):
            y = self.mv(params, aux, x)
            y = y if root is None else root * y
            return y if diagonal is None else jnp.concatenate([y, diagonal * x], -2)

        def rmv(y):
            top = y[..., :m, :]
            x = self.rmv(params, aux, top if root is None else root * top)
            return x if diagonal is None else x + diagonal * y[..., m:, :]

        def enter(t, rows):
            t = jnp.broadcast_to(t, (*lead, *t.shape[-2:]))
            if gate is not None:  # a zero right-hand side takes no step
                t = jnp.where(gate[..., None, None] > 0, t, 0)
            pad = [(0, 0)] * (t.ndim - 2) + [(0, rows - t.shape[-2]), (0, 0)]
            return jnp.pad(t, pad)

        rows = m if diagonal is None else m + n
        o = problem.options
        settings = {"atol": o.atol, "btol": o.btol, "conlim": o.conlim, "maxiter": o.maxiter}
        total, runs = None, []
        if c is not None:
            total = enter(c if root is None else root * c, rows)
        if g is not None:
            runs.append(lsmr(rmv, mv, enter(g, n), **settings))
            total = runs[0].x if total is None else total + runs[0].x
        runs.append(lsmr(mv, rmv, total, **settings))
        x = runs[-1].x
        ax = self.mv(params, aux, x)
        r = -ax if c is None else c - ax
        wr = r if w is None else w[..., None] * r
        normal = self.rmv(params, aux, wr)
        if g is not None:
            normal = normal + g
        if d2 is not None:
            normal = normal - d2[..., None] * x
        residual = jnp.sqrt(jnp.maximum(jnp.real(jnp.conj(r) * wr).sum(-2), 0))
        missed = _worst([run.status for run in runs])
        deficient = jnp.ones(lead, real)
        if problem.nonsingular:
            deficient = jnp.zeros(lead, real)
        elif d2 is not None:
            deficient = jnp.broadcast_to(jnp.where((d2 > 0).all(-1), 0.0, 1.0).astype(real), lead)
        if gate is not None:
            deficient = jnp.where(gate > 0, deficient, 0)
        iterations = sum(run.iterations for run in runs)
        columns = [missed, iterations, residual, jnp.linalg.norm(normal, axis=-2)]
        like = residual
        columns += [
            jnp.full_like(like, -1),
            runs[-1].cond,
            jnp.broadcast_to(deficient[..., None], like.shape),
        ]
        columns += [jnp.full_like(like, int(Method.lsmr))]
        info = jnp.stack([t.astype(real) for t in columns], -1)
        assert info.shape[-1] == INFO
        return x, ax, info, deficient


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
