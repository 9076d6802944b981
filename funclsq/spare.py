"""Copies of large tensors in memory that was used before.

Fresh memory is handed out in pages that the system must clear one by one, which costs several
times as much as the copy itself. So the memory of a large copy that nobody refers to any more is
kept for the next one of its size: a few pieces, and not too much in all.

Memory is given back by finalizers, which the garbage collector may run in the middle of anything,
this module included. So none of them waits, or touches what somebody has in hand: memory that
comes at the wrong moment is let go.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from funclsq.shapes import broadcast_shapes

__all__ = ["also_clear", "clear", "copied", "empty", "is_large", "product", "taken"]

_LARGE = 1 << 22  # bytes from which it is worth it
_SMALL = 1 << 16  # bytes below which the allocator does as well
_PIECES = 8
_BYTES = 1 << 28

_lock = threading.Lock()  # not an RLock: a finalizer in the same thread must find it taken
_spare: list[Tensor] = []  # the oldest first
_others: list[Callable[[], None]] = []


def is_large(t: Tensor) -> bool:
    """Whether a copy of t is dear, and its memory worth keeping."""
    return t.nbytes >= _LARGE and t.device.type == "cpu"


def copied(t: Tensor) -> Tensor:
    """Copy a plain tensor."""
    t = t.detach()
    if not is_large(t) or t.is_conj() or t.is_neg():
        return t.clone()
    return empty(t.shape, t.dtype).copy_(t)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that is not filled, kept for the next of its size when nobody uses it any more."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        return torch.empty(shape, dtype=dtype)
    memory = _take(size)
    owner = memory.numpy()[:]  # torch holds this view for as long as any tensor uses the memory
    weakref.finalize(owner, _give_back, memory).atexit = False
    return torch.from_numpy(owner).view(dtype).view(shape)


def taken(t: Tensor, index: Tensor) -> Tensor:
    """Copy the entries t[..., index] of a plain tensor.

    Of a batch on the CPU by NumPy, which takes a fifth of the time of torch there.
    """
    if t.device.type != "cpu" or t.requires_grad:
        return t.index_select(-1, index)
    out = empty((*t.shape[:-1], index.shape[0]), t.dtype)
    if t.ndim == 1:
        return torch.index_select(t, -1, index, out=out)
    np.take(t.resolve_conj().resolve_neg().numpy(), index.numpy(), -1, out.numpy(), mode="clip")
    return out


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply plain tensors entry by entry, into ``out`` if that has the size and type for it."""
    if a.device.type != "cpu" or a.requires_grad or b.requires_grad:
        return a * b
    dtype = torch.promote_types(a.dtype, b.dtype)
    shape = a.shape if a.shape == b.shape else broadcast_shapes(a.shape, b.shape)
    if out is None or out.shape != shape or out.dtype != dtype:
        out = empty(shape, dtype)
    return torch.mul(a, b, out=out)


def _take(size: int) -> Tensor:
    if _lock.acquire(blocking=False):
        try:
            for place, memory in enumerate(_spare):
                if memory.nbytes == size:
                    del _spare[place]
                    return memory
        finally:
            _lock.release()
    # torch's allocator, since NumPy's asks for huge pages, which some systems are slow to find
    return torch.empty(size, dtype=torch.uint8)


def _give_back(memory: Tensor) -> None:
    if _lock.acquire(blocking=False):
        try:
            _spare.append(memory)
            while len(_spare) > _PIECES or sum(m.nbytes for m in _spare) > _BYTES:
                del _spare[0]
        finally:
            _lock.release()


def also_clear(let_go: Callable[[], None]) -> None:
    """Have this called when spare memory is let go: it lets go of memory of another kind."""
    _others.append(let_go)


def clear() -> None:
    """Let go of all spare memory."""
    for let_go in _others:
        let_go()
    if _lock.acquire(timeout=1.0):
        try:
            _spare.clear()
        finally:
            _lock.release()
