"""Copies of large tensors, in memory that nobody uses any more."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from funclsq import products, raw, spare

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_spare():
    spare.clear()
    yield
    spare.clear()


def test_memory_of_large_copies_is_used_again_only_when_nobody_holds_it():
    t = torch.randn(800_000, dtype=torch.float64)
    raw.clear_cache()
    first = spare.copied(t)
    view, where = first[5:9], first.data_ptr()
    del first
    second = spare.copied(t)  # the view still needs the first memory
    assert second.data_ptr() != where
    assert torch.equal(view, t[5:9])
    del view
    third = spare.copied(t + 1)
    assert third.data_ptr() == where
    assert torch.equal(third, t + 1)
    assert torch.equal(second, t)
    z = torch.randn(700, 800, dtype=torch.complex128)
    assert torch.equal(spare.copied(z.T), z.T)
    assert torch.equal(spare.copied(z.mH), z.mH)
    del second, third
    held = [spare.copied(t[i:]) for i in range(20)]
    del held
    assert len(spare._spare) <= 8
    raw.clear_cache()
    assert not spare._spare


def test_what_is_large():
    for count, large in ((4 * MIB - 1, False), (4 * MIB, True), (4 * MIB + 1, True)):
        assert spare.is_large(torch.zeros(count, dtype=torch.uint8)) is large
        assert not spare.is_large(torch.empty(count, dtype=torch.uint8, device="meta"))
    assert spare.is_large(torch.zeros(MIB)) and not spare.is_large(torch.zeros(MIB - 1))


@pytest.mark.parametrize("count", [3, MIB])
def test_a_copy_is_equal_and_of_its_own(count):
    t = torch.arange(float(count), requires_grad=True)
    copy = spare.copied(t)
    assert torch.equal(copy, t) and copy.dtype == t.dtype and not copy.requires_grad
    assert copy.data_ptr() != t.data_ptr()
    copy[0] = 7
    assert float(t[0].detach()) == 0
    z = torch.complex(t.detach(), t.detach() + 1)
    for view in (z, z.conj(), z.conj().imag):
        assert torch.equal(spare.copied(view), view)


def test_memory_of_another_size_is_left_alone():
    a = spare.copied(torch.zeros(MIB))
    where = a.data_ptr()
    del a
    b = spare.copied(torch.zeros(MIB + 1))
    assert b.data_ptr() != where
    c, d = spare.copied(torch.zeros(MIB // 2, dtype=torch.float64)), spare.copied(torch.zeros(MIB))
    assert c.data_ptr() == where  # of the same size in bytes
    assert d.data_ptr() != where


def test_eight_pieces_of_a_quarter_gibibyte_in_all_are_kept():
    for count, pieces, left in ((MIB, 10, 8), (24 * MIB, 3, 2), (66 * MIB, 1, 0)):
        spare.clear()
        copies = [spare.copied(torch.empty(count)) for _ in range(pieces)]
        assert len(spare._spare) == 0
        del copies
        assert [m.nbytes for m in spare._spare] == [4 * count] * left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_a_large_product_lies_in_memory_that_was_used(k, dtype, monkeypatch):
    """And reads nothing of what was there before."""
    monkeypatch.setattr(spare, "_SMALL", 0)
    A = torch.randn(30, 20, dtype=dtype)
    A[torch.rand(30, 20) < 0.7] = 0
    A[3] = 0
    S, X = A.to_sparse_csr(), torch.randn(20, k, dtype=dtype)
    size = 30 * k * X.element_size()
    for larger, reused in ((size, True), (size + 1, False)):
        monkeypatch.setattr(products, "LARGE", larger)
        stale = spare.empty((30, k), dtype).fill_(torch.nan)
        where = stale.data_ptr()
        del stale
        Y = products.csr_mm(S, X)
        torch.testing.assert_close(Y, A @ X)
        assert (Y.data_ptr() == where) is reused
        again = products.csr_mm(S, 2 * X)  # Y is held
        torch.testing.assert_close(again, 2 * A @ X)
        torch.testing.assert_close(Y, A @ X)
        del Y, again
        spare.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("index", [[2, 0, 2, 4, 1], []])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (0, 5)])
def test_what_is_taken_is_what_torch_selects(shape, index, dtype):
    t, index = torch.randn(shape, dtype=dtype), torch.tensor(index, dtype=torch.int32)
    negative = torch.complex(t.real, t.real).conj().imag  # not written out until it is read
    for some in (t, t.conj(), negative, t.mul(2).requires_grad_()):
        want = some.index_select(-1, index)
        got = spare.taken(some, index)
        assert torch.equal(got, want) and got.requires_grad == want.requires_grad
        assert not got.is_conj() and (not got.is_neg() or got.ndim == 1)
    wide = torch.randn(4, 10, dtype=dtype)[:, ::2]  # not contiguous
    assert torch.equal(spare.taken(wide, index), wide.index_select(-1, index))


def test_what_is_taken_from_a_batch_lies_in_memory_that_was_used(monkeypatch):
    monkeypatch.setattr(spare, "_SMALL", 0)
    t, index = torch.randn(3, 5), torch.tensor([4, 4, 0, 1])
    stale = spare.empty((3, 4), t.dtype)
    where = stale.data_ptr()
    del stale
    got = spare.taken(t, index)
    assert got.data_ptr() == where
    assert torch.equal(got, t[:, [4, 4, 0, 1]])


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("kinds", [(float, float), (complex, float), (float, complex)])
def test_a_product_lies_in_memory_that_is_its_own_or_offered(kinds, lead):
    dtypes = [torch.float64 if kind is float else torch.complex128 for kind in kinds]
    a, b = (torch.randn(*lead, 20_000, dtype=dtype) for dtype in dtypes)
    expected = a * b
    first = spare.product(a, b)
    assert torch.equal(first, expected) and first.dtype == expected.dtype
    assert first.data_ptr() not in (a.data_ptr(), b.data_ptr())
    where = first.data_ptr()
    del first
    assert spare.product(a, b).data_ptr() == where
    offered = b.clone()
    into = spare.product(a, b, offered)
    assert torch.equal(into, expected)
    assert (into.data_ptr() == offered.data_ptr()) == (expected.dtype == b.dtype)
    wider = spare.product(a.unsqueeze(0).expand(2, *a.shape), b, offered)
    assert torch.equal(wider, expected.expand(2, *a.shape))
    loose = a.clone().requires_grad_()
    assert spare.product(loose, b).requires_grad and spare.product(b, loose).requires_grad


def test_entries_are_taken_into_memory_that_was_used_before():
    t, index = torch.randn(100, dtype=torch.float64), torch.randint(100, (20_000,))
    first = spare.taken(t, index)
    assert torch.equal(first, t[index])
    where = first.data_ptr()
    del first
    assert spare.taken(t + 1, index).data_ptr() == where
    assert spare.taken(t.clone().requires_grad_(), index).requires_grad


@pytest.mark.parametrize("where", ["_take", "_give_back", "<genexpr>"])
def test_garbage_collected_in_the_middle_gives_its_memory_up(where, monkeypatch):
    """Its finalizers come in the same thread, between any two steps of this module."""
    wrong = []
    monkeypatch.setattr(sys, "unraisablehook", wrong.append)
    seen = []
    gc.disable()
    try:
        for line in range(6):
            spare.clear()
            held = [spare.empty((size,), torch.float64) for size in (10_000, 11_000, 12_000)]
            del held
            cycle = [spare.empty((20_000,), torch.float64)]
            cycle.append(cycle)
            del cycle
            steps = []

            def trace(frame, event, argument, line=line, steps=steps):
                if event == "line" and frame.f_code.co_name == where:
                    steps.append(frame.f_lineno)
                    if len(steps) == line + 1:
                        seen.append(gc.collect())
                return trace if frame.f_code.co_filename == spare.__file__ else None

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                new = spare.empty((9_000,), torch.float64)
                del new
                fitting = spare.empty((11_000,), torch.float64)
            finally:
                sys.settrace(before)
            assert fitting.shape == (11_000,)
            assert len({m.data_ptr() for m in spare._spare} | {fitting.data_ptr()}) == 1 + len(
                spare._spare
            )
    finally:
        gc.enable()
    assert any(seen)
    assert not wrong


def test_a_finalizer_does_not_wait():
    t = spare.empty((20_000,), torch.float64)
    with spare._lock:
        fresh = spare.empty((20_000,), torch.float64)
        del t
    assert not spare._spare and fresh.shape == (20_000,)
    del fresh
    assert len(spare._spare) == 1
