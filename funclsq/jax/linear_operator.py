"""A matrix that is only a JAX function: solved by LSMR inside the JAX program."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from funclsq.jax.convert import jax_array
from funclsq.jax.matrix_free import Function

__all__ = ["LinearOperator"]


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

    Raises
    ------
    TypeError
        If ``matvec`` is not callable.

    Notes
    -----
    Keep ``matvec`` one object (a function defined once, not a fresh lambda at each call): programs
    are compiled once per object, and again when what it closes over or reads has changed; what
    changes often belongs into ``params``. A^H comes from ``jax.linear_transpose``. For
    rank-deficient A a gradient costs more solves; ``rank="full"`` says that it is not. Columns are
    not scaled, as their norms are not known: scale them in ``matvec`` where they differ much.

    Examples
    --------
    >>> import jax.numpy as jnp, funclsq.jax as flj
    >>> t = jnp.linspace(0, 1, 5)
    >>> def matvec(rate, v):
    ...     return v[0] * jnp.exp(-rate * t) + v[1]
    >>> A = flj.LinearOperator(matvec, (5, 2), jnp.asarray(2.0))
    >>> [round(float(c), 3) for c in flj.lstsq(A, 3 * jnp.exp(-2 * t) + 1)]
    [3.0, 1.0]
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
        leaves = [jax_array(t, "LinearOperator: a parameter") for t in leaves]
        example = jax.ShapeDtypeStruct((self.shape[1],), dtype)
        call, result, leaves = _traced(self.matvec, tree, leaves, example)
        inexact = tuple(bool(jnp.issubdtype(t.dtype, jnp.inexact)) for t in leaves)
        params = tuple(t for t, yes in zip(leaves, inexact) if yes)
        aux = tuple(t for t, yes in zip(leaves, inexact) if not yes)
        ndims = tuple(t.ndim for t in params), tuple(t.ndim for t in aux)
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
class _Recorded:
    """What a user's function of (params, v) computed when it was traced, of (leaves, v).

    Equal to another one if their programs and what these close over are: so a program is compiled
    once, and again when a global or an attribute that the function reads has changed.
    """

    matvec: Any
    tree: Any
    text: str
    constants: tuple[Any, ...]
    function: Any = dataclasses.field(compare=False)

    def __call__(self, leaves: Any, v: Any) -> Any:
        return self.function(*leaves, v)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Closed:
    """A traced function whose closed-over arrays have become leaves."""

    function: Any

    def __call__(self, leaves: Any, v: Any) -> Any:
        return self.function(*leaves, v)[0]


_ADDRESS = re.compile(r"0x[0-9a-f]+")  # of a rule in a printed program: another at each trace


def _traced(matvec: Any, tree: Any, leaves: list[Any], example: Any) -> tuple[Any, Any, list[Any]]:
    """Trace matvec: a function of (leaves, v), its result's shape, the leaves.

    Tracers that matvec closes over become leaves, so that derivatives in them are seen.
    """

    def of_leaves(*args: Any) -> Any:
        return matvec(jax.tree.unflatten(tree, args[:-1]), args[-1])

    traced, result = jax.make_jaxpr(of_leaves, return_shape=True)(*leaves, example)
    # copies: what the user does to an array later must not reach a program that is kept
    constants = [c if isinstance(c, jax.Array) else np.array(c) for c in traced.consts]
    traced = traced.replace(consts=constants)
    if not any(isinstance(c, jax.core.Tracer) for c in constants):
        text = _ADDRESS.sub("", str(traced.jaxpr))
        known = tuple(map(_identity, [*constants, *_inner_constants(traced.jaxpr)]))
        return _Recorded(matvec, tree, text, known, jaxpr_as_fun(traced)), result, leaves
    count = len(constants)

    def evaluate(*args: Any) -> Any:
        return jax.core.eval_jaxpr(traced.jaxpr, args[:count], *args[count:])

    hoisted = [*(jnp.asarray(c) for c in constants), *leaves]
    function = jaxpr_as_fun(jax.make_jaxpr(evaluate)(*hoisted, example))
    return _Closed(function), result, hoisted


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    """What the programs inside a program (of jit, above all) close over: it is not printed."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda t: isinstance(t, ClosedJaxpr)
        ):
            if isinstance(inner, ClosedJaxpr):
                yield from inner.consts
                yield from _inner_constants(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                yield from _inner_constants(inner)


def _identity(constant: Any) -> Any:
    """What tells a constant of a program from others while the program, which holds it, lives."""
    if isinstance(constant, jax.Array):
        return id(constant)
    constant = np.asarray(constant)
    return constant.shape, constant.dtype, constant.tobytes()
