"""What was prepared for given values, found again by content.

The same structure and settings with equal values find the same entry, in torch or from a JAX
callback, under every transform and from any thread. Entries are looked up by a fingerprint (a
few sampled values) and confirmed by comparing all values; nothing is keyed on identity, so
nothing can be stale. Bounded in number and memory, least recently used first.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funclsq import spare
from funclsq.methods._protocol import Prepared
from funclsq.operators import Operator

__all__ = ["Entry", "Key", "clear", "fingerprint", "keep", "lookup", "new", "pin"]

_ENTRIES = 16
_BYTES = 1 << 30
_SAMPLES = 16
_BLOCK = 1 << 15  # numbers compared at a time
_PLAIN = frozenset(  # what NumPy has as well
    {torch.float32, torch.float64, torch.complex64, torch.complex128, torch.int32, torch.int64}
)

_lock = threading.RLock()
_counter = itertools.count(1)
_recent: collections.OrderedDict[int, Entry] = collections.OrderedDict()
_index: dict[Any, list[Entry]] = {}
_seen: collections.OrderedDict[Any, None] = collections.OrderedDict()  # fingerprints
_pinned: weakref.WeakSet[Entry] = weakref.WeakSet()


class Key:
    """Structure, options and knowledge of the rank: hashed once, compared by identity first."""

    __slots__ = ("_hash", "parts")

    def __init__(self, *parts: Any) -> None:
        self.parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self.parts == other.parts)


@dataclasses.dataclass(eq=False)
class Entry:
    """A method prepared for the values in ``data``; ``op`` is A itself."""

    key: Key
    data: tuple[Tensor | None, ...]
    op: Operator
    prepared: Prepared
    shift: Tensor | None = None  # the method was prepared for 2^shift [W^(1/2) A; D]
    checked: bool = False  # the data was tested for NaN and Inf
    size: Tensor | None = None  # about that of W^(1/2) A, once it was asked for
    bound: Tensor | None = None  # no less than that
    number: int = 0
    found_by: Any = None
    own_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return self.own_bytes + int(self.prepared.nbytes)


def fingerprint(key: Key, data: tuple[Tensor | None, ...]) -> Any:
    """A few values: different for most different data, equal for equal data of equal layout."""
    return (key, *map(_sample, data))


def _sample(t: Tensor | None) -> Any:
    if t is None:
        return None
    flat = _flat(t)
    if flat is None:
        return t.shape, t.dtype
    return t.shape, t.dtype, flat[:: max(1, flat.size // _SAMPLES)].tobytes()


def lookup(key: Key, data: tuple[Tensor | None, ...], found_by: Any) -> Entry | None:
    """Entry with this key and equal data, if one is kept or pinned."""
    with _lock:
        candidates = list(_index.get(found_by, ()))
        if len(_pinned):
            candidates += [e for e in _pinned if e.key == key]
    for entry in candidates:
        if len(entry.data) == len(data) and all(map(_same, entry.data, data)):
            with _lock:
                if entry.number in _recent:
                    _recent.move_to_end(entry.number)
            return entry
    return None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    x, y = _flat(a), _flat(b)
    if x is None or y is None:
        return torch.equal(a, b)
    # block by block, half to two thirds of the time of torch up to some 600,000 numbers
    parts = (slice(i, i + _BLOCK) for i in range(0, x.size, _BLOCK))
    return all((x[part] == y[part]).all() for part in parts)


def _flat(t: Tensor) -> np.ndarray | None:
    """The numbers in the order of memory, as NumPy has them; None where it has not."""
    plain = t.device.type == "cpu" and t.dtype in _PLAIN and t.is_contiguous()
    return t.detach().numpy().reshape(-1) if plain and not (t.is_conj() or t.is_neg()) else None


def keep(entry: Entry, found_by: Any) -> None:
    """Keep an entry, and forget the oldest ones beyond the bounds."""
    entry.own_bytes = sum(t.nbytes for t in entry.data if t is not None)
    entry.found_by = found_by
    with _lock:
        entry.number = next(_counter)
        _recent[entry.number] = entry
        _index.setdefault(found_by, []).append(entry)
        total = sum(e.nbytes for e in _recent.values())
        while len(_recent) > 1 and (len(_recent) > _ENTRIES or total > _BYTES):
            _, old = _recent.popitem(last=False)
            total -= old.nbytes
            _forget(old)


def _forget(entry: Entry) -> None:
    same = _index[entry.found_by]
    same.remove(entry)
    if not same:
        del _index[entry.found_by]


def new(found_by: Any) -> bool:
    """Whether no data with this fingerprint was seen lately; now it has been."""
    with _lock:
        known = found_by in _seen
        _seen[found_by] = None
        _seen.move_to_end(found_by)
        while len(_seen) > _ENTRIES:
            _seen.popitem(last=False)
    return not known


def pin(entry: Entry) -> None:
    """Find this entry as long as somebody holds it."""
    with _lock:
        _pinned.add(entry)


def clear() -> None:
    """Forget everything that is not pinned."""
    with _lock:
        _recent.clear()
        _index.clear()
        _seen.clear()
    spare.clear()
