"""Loops that numba compiles, where it is installed, and their share of rows for each thread.

Indices are handed to them unsigned: a signed one may count from the end, which numba asks of every
entry, and which takes half to three quarters of the time of such a loop.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SHARE", "loops", "parts", "shared", "unsigned"]

SHARE = 1 << 19  # products (entries x columns) for each thread


@functools.cache
def loops() -> Any:
    """The compiled loops; None where numba is absent, unusable or told not to compile."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        found = importlib.import_module("funclsq.loops")
    except Exception:  # one that does not fit the NumPy that is installed, for instance
        return None
    return None if found.numba.config.DISABLE_JIT else found


def unsigned(index: Tensor) -> np.ndarray:
    """An index array as the loops take it; no copy."""
    array = index.numpy()
    return array.view(f"u{array.itemsize}")


def parts(indptr: np.ndarray, work: int, most: int | None = None) -> list[tuple[int, int]]:
    """Ranges of rows with about as many entries each, one for every thread that pays."""
    rows = indptr.size - 1
    threads = work // SHARE
    if threads > 1:
        threads = min(torch.get_num_threads(), threads, threads if most is None else most)
    if threads < 2:
        return [(0, rows)]
    wanted = np.linspace(0, int(indptr[-1]), threads + 1)[1:-1]
    cuts = [0, *np.searchsorted(indptr, wanted).tolist(), rows]
    return list(itertools.pairwise(cuts))


def shared(call: Callable[[int, int, int], Any], ranges: list[tuple[int, int]]) -> list[Any]:
    """``call(number, start, stop)`` for every range of rows, each in a thread of its own."""
    if len(ranges) == 1:
        return [call(0, *ranges[0])]
    numbered = [(number, *rows) for number, rows in enumerate(ranges)]
    try:
        others = [_pool(len(ranges)).submit(call, *part) for part in numbered[1:]]
    except RuntimeError:  # the interpreter is ending
        return [call(*part) for part in numbered]
    return [call(*numbered[0]), *(other.result() for other in others)]


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads - 1, "funclsq")


if hasattr(os, "register_at_fork"):  # a child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
