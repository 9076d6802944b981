"""The sampled outer product in one pass over the entries, where numba is installed.

torch has no such loop: for few columns two vectors are gathered, multiplied and added up for each
(``products.sddmm_few``), and for more its own product takes 27 ns for an entry in float64 before it
reads a number (``products.sddmm_csr``). One thread, by torch over by the loop, on four patterns and
a batch of 160,000 to 960,000 entries:

    columns           1        2        4        5        8       16       64      128
    float64     0.8-1.2  1.8-2.7  1.9-2.4  6.1-7.5  4.8-7.5  3.6-6.7  1.3-3.0  1.1-1.8
    complex128  1.2-2.0  2.2-3.0  2.6-3.0  2.2-2.7  2.2-2.7  1.5-2.0  1.1-1.5  1.2-1.4
    float32     0.6-1.1  1.3-2.1  about 1 and less from here on
    complex64   0.8-0.9  1.3-1.7  1.2-1.6  about 1

What the loop does not gain is left to torch. Equal to rounding, and real numbers of up to
four columns to the last digit.
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

from funclsq import spare
from funclsq.products import few_terms

__all__ = ["sampled"]

LEAST = 1 << 16  # products (entries x columns) below which there is little to gain: 0.1 ms
SHARE = 1 << 19  # products for each thread
DOUBLE = frozenset({torch.float64, torch.complex128})


def sampled(indptr: Tensor, indices: Tensor, U: Tensor, V: Tensor) -> Tensor | None:
    """sum_k U[.., i, k] conj(V[.., j, k]) at the entries of a CSR pattern; None: leave it to torch.

    U is (m, k) or (b, m, k), V (n, k) or (b, n, k); the result (nnz,) or (b, nnz).
    """
    k, members = U.shape[-1], U.shape[0] if U.ndim == 3 else 1
    work = members * indices.shape[0] * k
    if U.device.type != "cpu" or work < LEAST:
        return None
    few = k <= few_terms(U.dtype)
    if k == 1 or not (few or U.dtype in DOUBLE):
        return None
    loops = _loops()
    if loops is None:
        return None
    loop = loops.sample_few if few else loops.sample_many
    u, v = (_array(t.mT if few else t) for t in (U, V.conj()))
    out = spare.empty((members, indices.shape[0]), U.dtype)
    arguments = indptr.numpy(), indices.numpy(), u, v, out.numpy()
    _by_rows(functools.partial(loop, *arguments), arguments[0], work)
    return out.view(*U.shape[:-2], -1)


def _array(t: Tensor) -> np.ndarray:
    """A block, or one for each member, as a stack of blocks in the order of their indices."""
    a = np.ascontiguousarray(
        t.detach().resolve_conj().resolve_neg().numpy()
    )  # torch: twice as long
    return a.reshape(-1, *a.shape[-2:])


@functools.cache
def _loops() -> Any:
    """The compiled loops; None where numba is absent, unusable or told not to compile."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        loops = importlib.import_module("funclsq.loops")
    except Exception:  # one that does not fit the NumPy that is installed, for instance
        return None
    return None if loops.numba.config.DISABLE_JIT else loops


def _by_rows(loop: Callable[[int, int], None], indptr: np.ndarray, work: int) -> None:
    """Call ``loop(start, stop)`` for all rows: in as many threads as torch takes, where it pays."""
    rows, threads = indptr.size - 1, min(torch.get_num_threads(), work // SHARE)
    if threads < 2:
        loop(0, rows)
        return
    wanted = np.linspace(0, indptr[-1], threads + 1)[1:-1]  # entries, the same for each
    cuts = [0, *np.searchsorted(indptr, wanted).tolist(), rows]
    parts = list(itertools.pairwise(cuts))
    try:
        others = [_pool(threads).submit(loop, *part) for part in parts[1:]]
    except RuntimeError:  # the interpreter is ending
        loop(0, rows)
        return
    loop(*parts[0])
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads - 1, "funclsq")


if hasattr(os, "register_at_fork"):  # a child has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
