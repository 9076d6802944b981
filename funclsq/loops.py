"""Loops that numba compiles: imported only where numba is.

Compiled once per type of entry and index, and kept on disk where a folder for it can be written.
Indices come unsigned (see ``compiled``), and whatever counts is made so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = [
    "adjoint",
    "apply",
    "apply_diagonal",
    "cg_step",
    "craig_step",
    "descend",
    "descend_diagonal",
    "lengths",
    "lsmr_step",
    "lsqr_step",
    "sample_few",
    "sample_many",
    "scaled",
    "through",
    "through_diagonal",
    "turn",
]

_at = np.uintp
_ROWS, _CACHED = 256, 2048  # rows and entries of a part that stays in the first cache
_OWN = 1 << 20  # bytes of the second cache


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    def compiled(loop: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(loop)
        except RuntimeError:  # no folder to keep it in
            return numba.njit(nogil=True, **options)(loop)

    return compiled


# Sampled outer products


@_compiled()  # nothing reordered or contracted: the digits of one operation after another
def sample_few(indptr, indices, U, Vh, out, start, stop):
    """Sampled outer products of members, for rows start to stop; U (b, k, m), Vh (b, k, n).

    Each column is in one piece.
    """
    members, k, _ = U.shape
    for member in range(members):
        u, v, entries = U[member], Vh[member], out[member]
        for i in range(_at(start), _at(stop)):
            begin, end = _at(indptr[i]), _at(indptr[i + _at(1)])
            if k == 1:
                u0 = u[0, i]
                for e in range(begin, end):
                    entries[e] = u0 * v[0, indices[e]]
            elif k == 2:
                u0, u1 = u[0, i], u[1, i]
                for e in range(begin, end):
                    j = indices[e]
                    entries[e] = u0 * v[0, j] + u1 * v[1, j]
            else:
                for e in range(begin, end):
                    j = indices[e]
                    total = u[0, i] * v[0, j]
                    for c in range(_at(1), _at(k)):
                        total += u[c, i] * v[c, j]
                    entries[e] = total


@_compiled(fastmath={"reassoc", "contract"})  # sums in the width of the machine's registers
def sample_many(indptr, indices, U, Vh, out, start, stop):
    """The same for many columns: U (b, m, k), Vh (b, n, k)."""
    members, _, k = U.shape
    zero = np.zeros(1, U.dtype)[0]
    for member in range(members):
        u, v, entries = U[member], Vh[member], out[member]
        for i in range(_at(start), _at(stop)):
            row = u[i]
            for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
                other = v[indices[e]]
                total = zero
                for c in range(_at(k)):
                    total += row[c] * other[c]
                entries[e] = total


# One column through a matrix: what is returned is a squared norm, in double precision


@_compiled(fastmath={"contract"})
def apply(indptr, indices, values, x, y, start, stop):
    """y = A x in rows start to stop; ||y||^2 there."""
    zero, square = np.zeros(1, y.dtype)[0], 0.0
    for i in range(_at(start), _at(stop)):
        total = zero
        for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
            total += values[e] * x[indices[e]]
        y[i] = total
        square += np.float64(total.real) ** 2 + np.float64(total.imag) ** 2
    return square


@_compiled(fastmath={"contract"})
def adjoint(indptr, indices, values, y, x, start, stop):
    """x += A^H y, of rows start to stop."""
    for i in range(_at(start), _at(stop)):
        t = y[i]
        for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
            x[indices[e]] += np.conj(values[e]) * t


@_compiled(fastmath={"contract"})
def through(indptr, indices, values, x, scale, u, p, start, stop):
    """u <- A x - scale u (u may hold anything where scale is 0), p += A^H u; ||u||^2.

    A few rows go forth and then back, and are in the first cache still: row by row, the way back
    would wait for each sum to be complete. Where x and p do not fit beside each other into what a
    core has of its own, all rows go forth first.
    """
    zero, square = np.zeros(1, u.dtype)[0], 0.0
    begin, end = _at(indptr[start]), _at(indptr[stop])
    several = max(1, min(_ROWS, _CACHED * (stop - start) // max(1, end - begin)))
    if (x.size + p.size) * p.itemsize > _OWN:
        several = max(1, stop - start)
    for first in range(start, stop, several):
        last = min(first + several, stop)
        for i in range(_at(first), _at(last)):
            total = zero
            for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
                total += values[e] * x[indices[e]]
            u[i] = total if scale == 0 else total - scale * u[i]
        for i in range(_at(first), _at(last)):
            t = u[i]
            square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
            for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
                p[indices[e]] += np.conj(values[e]) * t
    return square


@_compiled(fastmath={"contract"})
def through_diagonal(damp, x, scale, u, p):
    """The same for a real diagonal matrix."""
    square = 0.0
    for i in range(_at(damp.size)):
        total = damp[i] * x[i]
        u[i] = total if scale == 0 else total - scale * u[i]
        t = u[i]
        square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
        p[i] += damp[i] * t
    return square


@_compiled(fastmath={"contract"})
def apply_diagonal(damp, x, y):
    """y = D x; ||y||^2."""
    square = 0.0
    for i in range(_at(damp.size)):
        y[i] = damp[i] * x[i]
        t = y[i]
        square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
    return square


@_compiled(fastmath={"contract"})
def descend_diagonal(damp, alpha, q, r, s):
    """r <- r - alpha q, s += D r; ||r||^2."""
    square = 0.0
    for i in range(_at(damp.size)):
        r[i] -= alpha * q[i]
        t = r[i]
        square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
        s[i] += damp[i] * t
    return square


@_compiled(fastmath={"contract"})
def descend(indptr, indices, values, alpha, q, r, s, start, stop):
    """r <- r - alpha q, s += A^H r; ||r||^2."""
    square = 0.0
    for i in range(_at(start), _at(stop)):
        r[i] -= alpha * q[i]
        t = r[i]
        square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
        for e in range(_at(indptr[i]), _at(indptr[i + _at(1)])):
            s[indices[e]] += np.conj(values[e]) * t
    return square


# What else a step does to its vectors


@_compiled(fastmath={"contract"})
def turn(p, a, old, b):
    """p <- a p - b old; ||p||^2."""
    square = 0.0
    for i in range(_at(p.size)):
        p[i] = a * p[i] - b * old[i]
        t = p[i]
        square += np.float64(t.real) ** 2 + np.float64(t.imag) ** 2
    return square


@_compiled(fastmath={"contract"})
def lsmr_step(v, unit, h, a, hbar, b, x, c):
    """v <- unit v, hbar <- h + a hbar, x <- x + b hbar, h <- v + c h."""
    for i in range(_at(v.size)):
        v[i] *= unit
        hbar[i] = h[i] + a * hbar[i]
        x[i] += b * hbar[i]
        h[i] = v[i] + c * h[i]


@_compiled(fastmath={"contract"})
def lsqr_step(v, unit, w, x, b, c):
    """v <- unit v, x <- x + b w, w <- v + c w."""
    for i in range(_at(v.size)):
        v[i] *= unit
        x[i] += b * w[i]
        w[i] = v[i] + c * w[i]


@_compiled(fastmath={"contract"})
def craig_step(u, a, d, b, x, s):
    """d <- a u + b d, x <- x + s d."""
    for i in range(_at(u.size)):
        d[i] = a * u[i] + b * d[i]
        x[i] += s * d[i]


@_compiled(fastmath={"contract"})
def cg_step(x, a, p, t, b):
    """x <- x + a p, p <- t + b p."""
    for i in range(_at(p.size)):
        x[i] += a * p[i]
        p[i] = t[i] + b * p[i]


# The entries alone


@_compiled()
def lengths(indices, values, out):
    """out_j += |a|^2 over the entries a of column j; members of values (b, nnz), of out (b, n)."""
    for member in range(values.shape[0]):
        entries, sums = values[member], out[member]
        for e in range(_at(indices.size)):
            a = entries[e]
            sums[indices[e]] += a.real * a.real + a.imag * a.imag


@_compiled()
def scaled(indices, values, factors, out):
    """out_e = a_e factors_j over the entries of column j; b members, or one for all factors."""
    one = factors.shape[0] == 1
    for member in range(out.shape[0]):
        entries, into = values[member if values.shape[0] > 1 else 0], out[member]
        each = factors[0 if one else member]
        for e in range(_at(indices.size)):
            into[e] = entries[e] * each[indices[e]]
