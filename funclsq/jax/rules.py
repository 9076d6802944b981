"""What every primitive of this package shares: eager evaluation and abstract results."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import ShapedArray
from jax.interpreters import ad
from jax.sharding import NamedSharding, PartitionSpec

__all__ = ["abstract", "eager", "given", "no_tangent", "vary"]


def eager(primitive: Any) -> Callable[..., Any]:
    """Evaluate a primitive outside ``jit`` by compiling it once per shape and static part."""

    @functools.lru_cache(maxsize=512)
    def compiled(static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **dict(static)))

    def impl(*operands: Any, **static: Any) -> Any:
        with jax.disable_jit(False):  # else this would call itself for ever
            return compiled(tuple(sorted(static.items())))(*operands)

    return impl


def abstract(shape: tuple[int, ...], dtype: Any, *operands: Any) -> ShapedArray:
    """Abstract result: on the mesh of the operands, sharded over none of its axes.

    Inside ``shard_map`` it varies over the axes that the operands vary over (:func:`vary`).
    """
    like = max(operands, key=lambda a: len(_varying(a)))
    mesh = getattr(getattr(like, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return ShapedArray(shape, dtype)
    sharding = NamedSharding(mesh, PartitionSpec(*(None for _ in shape)))
    return like.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _varying(aval: Any) -> frozenset[Any]:
    """Mesh axes that an abstract array varies over inside ``shard_map``."""
    kind = getattr(aval, "mat", None)
    axes = getattr(aval, "vma", None) if kind is None else kind.varying
    return frozenset(axes or ())


def given(dot: Any) -> bool:
    """Whether a tangent or cotangent is there and not a symbolic zero."""
    return dot is not None and not isinstance(dot, ad.Zero)


def no_tangent(value: Any) -> ad.Zero:
    """Symbolic zero tangent of a value."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def vary(operands: Any) -> list[Any]:
    """Make all operands vary over the mesh axes (of ``shard_map``) that any of them varies over.

    So replicated operands are broadcast by an operation that JAX can transpose (to a sum).
    """
    axes = [_varying(jax.typeof(t)) for t in operands]
    every = frozenset().union(*axes)
    if not every:
        return list(operands)
    return [t if own == every else _cast(t, tuple(every - own)) for t, own in zip(operands, axes)]


def _cast(t: Any, axes: tuple[Any, ...]) -> Any:
    pcast: Any = getattr(jax.lax, "pcast", None)
    if pcast is None:  # JAX before 0.8
        return getattr(jax.lax, "pvary")(t, axes)  # noqa: B009
    return pcast(t, axes, to="varying")
