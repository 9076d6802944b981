"""Numerics that ``torch.autocast`` leaves alone: what comes in single precision stays in it.

Autocast runs matrix products in 16 bits wherever they are called. A solve then ends with three
digits, and nothing in it could tell.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["full_precision", "in_full_precision"]

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off for a type of device, where it is on."""
    if torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def in_full_precision(f: F) -> F:
    """Run f without autocast on the device of its last argument, a tensor."""

    @functools.wraps(f)
    def run(*args: Any) -> Any:
        kind = args[-1].device.type
        if not torch.is_autocast_enabled(kind):
            return f(*args)
        with torch.autocast(kind, enabled=False):
            return f(*args)

    return run  # type: ignore[return-value]
