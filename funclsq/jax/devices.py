"""Operands that lie on different devices: the error of JAX, in the user's words."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

__all__ = ["one_device"]

_NAMES = {"params": "A", "aux": "the indices of A"}


@contextlib.contextmanager
def one_device(name: str, arrays: dict[str, Any]) -> Iterator[None]:
    """Say which operand lies where, if JAX refuses them because they are on several devices."""
    try:
        yield
    except ValueError as error:
        if "incompatible devices" not in str(error):
            raise
        places = list(_places(arrays))
        shown = [f"{what} on {where}" for what, where in places]
        if len({where for _, where in places}) < 2:
            shown.append("a traced operand elsewhere")
        raise ValueError(
            f"{name}: all operands must be on the same device; got {', '.join(shown)}. Move them "
            "with jax.device_put, for example b = jax.device_put(b, A.sharding)."
        ) from error


def _places(arrays: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and devices of the operands that are committed to some (tracers do not tell)."""
    for key, value in arrays.items():
        for t in jax.tree.leaves(value):
            known = isinstance(t, jax.Array) and not isinstance(t, jax.core.Tracer)
            if known and getattr(t, "committed", True):
                devices = sorted(map(str, t.devices()))
                yield _NAMES.get(key, key), " and ".join(devices)
