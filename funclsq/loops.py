"""Loops that numba compiles: imported only where numba is.

Compiled once per type of entry and index, and kept on disk where a folder for it can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["sample_few", "sample_many"]


def _compiled(**options: Any) -> Callable[[Callable[..., None]], Any]:
    def compiled(loop: Callable[..., None]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(loop)
        except RuntimeError:  # no folder to keep it in
            return numba.njit(nogil=True, **options)(loop)

    return compiled


@_compiled()  # nothing reordered or contracted: the digits of one operation after another
def sample_few(indptr, indices, U, Vh, out, start, stop):
    """Sampled outer products of members, for rows start to stop; U (b, k, m), Vh (b, k, n).

    There are two columns or more, each in one piece.
    """
    members, k, _ = U.shape
    for member in range(members):
        u, v, entries = U[member], Vh[member], out[member]
        for i in range(start, stop):
            if k == 2:
                u0, u1 = u[0, i], u[1, i]
                for e in range(indptr[i], indptr[i + 1]):
                    j = indices[e]
                    entries[e] = u0 * v[0, j] + u1 * v[1, j]
            else:
                for e in range(indptr[i], indptr[i + 1]):
                    j = indices[e]
                    total = u[0, i] * v[0, j]
                    for c in range(1, k):
                        total += u[c, i] * v[c, j]
                    entries[e] = total


@_compiled(fastmath={"reassoc", "contract"})  # sums in the width of the machine's registers
def sample_many(indptr, indices, U, Vh, out, start, stop):
    """The same for many columns: U (b, m, k), Vh (b, n, k)."""
    members, _, k = U.shape
    zero = np.zeros(1, U.dtype)[0]
    for member in range(members):
        u, v, entries = U[member], Vh[member], out[member]
        for i in range(start, stop):
            row = u[i]
            for e in range(indptr[i], indptr[i + 1]):
                other = v[indices[e]]
                total = zero
                for c in range(k):
                    total += row[c] * other[c]
                entries[e] = total
