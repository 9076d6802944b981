"""Powers of two and sizes: exact, to both ends of the range."""

from __future__ import annotations

import math

import pytest
import torch

from funclsq.extent import extent, finite, largest
from funclsq.range import (
    column_range,
    exponent,
    extreme,
    power,
    representable,
    safe_norm,
    shifted,
    within,
)

REAL = [torch.float32, torch.float64]
ENDS = {torch.float32: (-148, 127), torch.float64: (-1073, 1023)}  # of 2^e, subnormal to largest
DANGER = {torch.float32: 20, torch.float64: 250}


def _two(e, dtype):
    return torch.tensor(math.ldexp(1.0, e), dtype=dtype)


@pytest.mark.parametrize("dtype", REAL)
def test_exponents_are_those_of_frexp(dtype):
    low, high = ENDS[dtype]
    for e in (low, low + 1, low // 2, -3, 0, 1, high // 2, high - 1):
        for part in (1.0, 1.5, -1.0):
            t = torch.tensor([0.0, part * math.ldexp(1.0, e), 0.0], dtype=dtype)
            want = math.frexp(float(t[1]))[1]
            assert int(exponent(t, (-1,))) == want
            z = torch.complex(torch.zeros_like(t), t)
            assert int(exponent(z, (-1,))) == int(exponent(z.conj(), (-1,))) == want
    for t in ([0.0, 0.0], [1.0, math.inf], [1.0, math.nan], []):
        assert int(exponent(torch.tensor(t, dtype=dtype), (-1,))) == 0


def test_exponents_of_columns_and_of_matrices():
    t = torch.tensor([[[1.0, 8.0], [3.0, -9.0]], [[0.0, 0.25], [0.0, 0.1]]])
    assert exponent(t, (-2,)).tolist() == [[2, 4], [0, -1]]
    assert exponent(t, (-2, -1)).tolist() == [4, -1]
    assert exponent(t, (-2,)).dtype == torch.int32
    for dims, want in (((-2,), (2, 3)), ((-2, -1), (2,))):
        got = exponent(torch.zeros(2, 0, 3), dims)
        assert tuple(got.shape) == want and got.dtype == torch.int32 and not bool(got.any())


@pytest.mark.parametrize("dtype", REAL)
def test_where_squares_are_in_danger(dtype):
    limit = DANGER[dtype]
    inside, outside = torch.tensor([0, limit, -limit]), (limit + 1, -limit - 1)
    assert not extreme(inside, dtype)
    for e in outside:
        assert extreme(torch.tensor([0, e]), dtype)
    bound = 2.0**limit
    assert within((1.0, 1.0), dtype) and within((1.01 / bound, 0.99 * bound), dtype)
    for sizes in ((1 / bound, 1.0), (1.0, bound), (0.0, 1.0), (math.nan, math.nan)):
        assert not within(sizes, dtype)


def test_sizes_of_columns():
    v = torch.tensor([[1.0, -7.0, 0.5], [-2.0, 3.0, 0.25]])
    assert column_range(v) == (0.5, 7.0)
    assert column_range(v[:, 1:2]) == (7.0, 7.0)
    assert column_range(v[:1]) == (0.5, 7.0)
    assert column_range(torch.stack((v, 2 * v))) == (0.5, 14.0)
    assert column_range(v[:, :0]) == column_range(v[:0]) == (1.0, 1.0)
    assert math.isnan(column_range(v * math.nan)[1])


@pytest.mark.parametrize("dtype", [*REAL, torch.complex64, torch.complex128])
def test_shifts_are_exact_to_both_ends(dtype):
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    low, high = ENDS[real]
    for start, e in ((low, 2 * high - 2), (high, low - high), (0, high), (high, -high), (-3, 5)):
        t = 1.5 * _two(start, real).to(dtype) if start > low else _two(start, real).to(dtype)
        t = t * (1 + 1j) if dtype.is_complex and abs(start + e) < 100 else t
        got = shifted(t, torch.tensor(e))
        want = complex(t)
        parts = [math.ldexp(part, e) for part in (want.real, want.imag)]
        assert got.dtype == dtype and complex(got) == complex(*parts)
    rows = shifted(torch.ones(2, 2, dtype=dtype), torch.tensor([[1], [-1]]))
    assert rows.tolist() == [[2, 2], [0.5, 0.5]]
    if not dtype.is_complex:
        assert power(torch.tensor([3, -2]), dtype).tolist() == [8, 0.25]
        assert power(torch.tensor(0), dtype).dtype == dtype


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 126), (torch.float64, 1020)])
def test_exponents_to_multiply_by_are_normal(dtype, limit):
    e = torch.tensor([-4000, -limit - 1, -limit, 0, 7, limit, limit + 1])
    got = representable(e, dtype)
    assert got.tolist() == [-limit, -limit, -limit, 0, 7, limit, limit]
    two = power(got, dtype)
    assert bool(((two >= torch.finfo(dtype).tiny) & torch.isfinite(two)).all())


@pytest.mark.parametrize("dtype", REAL)
@pytest.mark.parametrize("size", ["small", "large", "both"])
def test_norms_that_can_be_represented_are_right(dtype, size):
    low, high = ENDS[dtype]
    close = {"rtol": 1e-6, "atol": 0}
    low += 60 if dtype == torch.float64 else 30  # whole digits
    v = torch.randn(5, 2, dtype=dtype, generator=torch.Generator().manual_seed(3))
    e = {"small": (low, low), "large": (high - 4, high - 4), "both": (low, high - 4)}[size]
    v = torch.stack([v[:, i] * _two(e[i], dtype) for i in range(2)], 1)
    lengths = torch.tensor([math.hypot(*column) for column in v.T.tolist()], dtype=torch.float64)
    torch.testing.assert_close(safe_norm(v).double(), lengths, **close)
    z = torch.complex(v, -v)
    torch.testing.assert_close(safe_norm(z).double(), lengths * 2**0.5, **close)


@pytest.mark.parametrize(
    ("entries", "pair"),
    [([3.0, -5.0, 1.0], (-5.0, 3.0)), ([2.0, 7.0], (2.0, 7.0)), ([-2.0, -7.0], (-7.0, -2.0))],
)
def test_the_extent_of_entries(entries, pair):
    t = torch.tensor(entries, dtype=torch.float64)
    assert extent(t) == pair
    assert largest(t) == max(map(abs, entries))
    assert extent(1j * t) == (min(0.0, pair[0]), max(0.0, pair[1]))
    assert extent((1j * t).conj()) == (min(0.0, -pair[1]), max(0.0, -pair[0]))
    assert largest((1j * t).conj()) == largest(t)


def test_what_is_not_finite_is_seen():
    assert extent(torch.zeros(0)) == (0.0, 0.0)
    assert finite(None) and finite(torch.ones(3)) and finite(torch.zeros(0))
    for bad in (math.nan, math.inf, -math.inf):
        t = torch.tensor([1.0, bad, -1.0])
        assert not finite(t)
        assert not finite(torch.complex(torch.ones(3), t))
        assert largest(t) == math.inf or (math.isnan(bad) and math.isnan(largest(t)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_extent_of_a_large_tensor(dtype, threads, monkeypatch):
    """By blocks where one thread looks; the same."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draw = torch.Generator().manual_seed(0)
    for count in (65_536, 65_537, 100_003):
        t = torch.randn(count, generator=draw, dtype=dtype)
        parts = torch.view_as_real(t) if t.is_complex() else t
        low, high = float(parts.min()), float(parts.max())
        assert extent(t) == extent(torch.stack((t, t), 1)[:, 1]) == (low, high)
        assert extent(torch._neg_view(t)) == (-high, -low)
        if t.is_complex():
            low, high = float(t.real.min()), float(t.real.max())
            low, high = min(low, -float(t.imag.max())), max(high, -float(t.imag.min()))
            assert extent(t.conj()) == (low, high)
        for place in (0, count // 2, count - 1):
            for bad in (math.nan, math.inf, -math.inf):
                worse = t.clone()
                worse[place] = bad
                assert not finite(worse)
                assert [math.isnan(end) for end in extent(worse)] == 2 * [math.isnan(bad)]
