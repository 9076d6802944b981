"""The sampled outer product by compiled loops: the plain way's numbers, and when it is taken."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import funclsq as fl
from funclsq import compiled, fused
from funclsq.entries import sddmm
from funclsq.products import FEW_TERMS, few_terms

numba = pytest.importorskip("numba")

from funclsq import loops

F64 = torch.float64
EVERY = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.fixture
def calls(monkeypatch):
    """Loops for the smallest work; the ranges of rows that they are called for."""
    monkeypatch.setattr(fused, "LEAST", 0)
    seen = []
    for name in ("sample_few", "sample_many"):
        monkeypatch.setattr(loops, name, spied(getattr(loops, name), name, seen))
    return seen


def spied(loop, name, seen):
    def spy(*arguments):
        seen.append((name, *arguments[-2:]))
        loop(*arguments)

    return spy


def drawn(k, dtype, batch=(), m=40, n=50, count=300):
    g = torch.Generator().manual_seed(k)
    row = torch.randint(0, m // 2, (count,), generator=g) * 2  # every other row is empty
    col = torch.randint(0, n, (count,), generator=g)  # entries repeat
    U = torch.randn((*batch, m, k), generator=g, dtype=dtype)
    V = torch.randn((*batch, n, k), generator=g, dtype=dtype)
    return fl.SparsityPattern(row.numpy(), col.numpy(), (m, n)), U, V, (row, col)


def plainly(monkeypatch, *arguments, **keywords):
    with monkeypatch.context() as patch:
        patch.setattr(fused, "LEAST", 1 << 60)
        return sddmm(*arguments, **keywords)


@pytest.mark.parametrize("k", [1, 2, 3, FEW_TERMS, FEW_TERMS + 1, 8, 33])
@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_values_are_those_of_the_definition_and_of_torch(k, dtype, batch, calls, monkeypatch):
    S, U, V, (row, col) = drawn(k, dtype, batch)
    found = sddmm(S, U, V, batched=bool(batch))
    (name,) = {name for name, *_ in calls}
    assert name == ("sample_few" if k <= few_terms(dtype) else "sample_many")
    wide = torch.complex128 if dtype.is_complex else F64
    u, v = U.to(wide)[..., row, :], V.to(wide)[..., col, :]
    size = (u.abs() * v.abs()).sum(-1)
    eps = torch.finfo(dtype).eps
    assert ((found.to(wide) - (u * v.conj()).sum(-1)).abs() <= (k + 2) * eps * size).all()
    plain = plainly(monkeypatch, S, U, V, batched=bool(batch))
    assert ((found - plain).abs() <= 2 * (k + 2) * eps * size).all()
    if k <= few_terms(dtype) and not dtype.is_complex:
        assert torch.equal(found, plain)


def test_members_of_a_shared_pattern_are_summed(calls, monkeypatch):
    S, U, V, _ = drawn(2, F64, (5,))
    found = sddmm(S, U, V, batched=False)  # ten columns
    assert [name for name, *_ in calls] == ["sample_many"]
    torch.testing.assert_close(found, sddmm(S, U, V, batched=True).sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("view", ["transposed", "strided", "conjugate", "negative", "expanded"])
def test_views(view, calls, monkeypatch):
    S, U, V, _ = drawn(6, torch.complex128)
    turn = {
        "transposed": lambda t: t.T.contiguous().T,
        "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "conjugate": torch.conj,
        "negative": lambda t: t.conj().imag,
        "expanded": lambda t: t[:1].expand(t.shape),
    }[view]
    U, V = turn(U), turn(V)
    found = sddmm(S, U, V, batched=False)
    assert calls
    U, V = (t.resolve_conj().resolve_neg().contiguous() for t in (U, V))
    want = sddmm(S, U, V, batched=False)
    assert torch.equal(found, want)


@pytest.mark.parametrize("k", [2, 9])
def test_what_is_not_finite_stays_where_it_belongs(k, calls):
    S, U, V, (row, col) = drawn(k, F64)
    U[0, -1], V[3, 0] = torch.inf, torch.nan
    found = sddmm(S, U, V, batched=False)
    want = (U[row] * V[col]).sum(-1)
    assert calls and (~found.isfinite()).any()
    torch.testing.assert_close(found, want, rtol=1e-13, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_rows_are_shared_among_threads(threads, batch, calls, monkeypatch):
    S, U, V, _ = drawn(8, F64, batch)
    alone = sddmm(S, U, V, batched=bool(batch))
    calls.clear()
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(sddmm(S, U, V, batched=bool(batch)), alone)
    ranges = sorted(part[1:] for part in calls)
    assert len(ranges) == threads
    assert ranges[0][0] == 0 and ranges[-1][1] == S.shape[0]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    counts = [S.indptr[stop] - S.indptr[start] for start, stop in ranges]
    assert max(counts) <= S.nnz_unique / threads + 2 * np.diff(S.indptr).max()


def test_an_error_in_a_thread_is_raised(calls, monkeypatch):
    S, U, V, _ = drawn(8, F64)

    def fails(*arguments):
        if arguments[-2] > 0:
            raise MemoryError("of a thread")

    monkeypatch.setattr(loops, "sample_many", fails)
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with pytest.raises(MemoryError, match="of a thread"):
        sddmm(S, U, V, batched=False)


def test_one_thread_does_it_all_where_none_can_be_started_any_more(calls, monkeypatch):
    S, U, V, _ = drawn(8, F64)
    want = sddmm(S, U, V, batched=False)
    ended = compiled._pool(5)
    ended.shutdown()
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    try:
        assert torch.equal(sddmm(S, U, V, batched=False), want)
    finally:
        compiled._pool.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_threads_of_its_own():
    script = """
import os, warnings
import numpy as np, torch
import funclsq as fl
from funclsq import compiled, fused
from funclsq.entries import sddmm

warnings.simplefilter("ignore", DeprecationWarning)
torch.set_num_threads(1)
fused.LEAST = compiled.SHARE = 1
torch.get_num_threads = lambda: 2
S = fl.SparsityPattern(np.arange(40), np.arange(40) % 7, (40, 7))
U, V = torch.ones(40, 6).double(), torch.ones(7, 6).double()
assert (sddmm(S, U, V, batched=False) == 6).all() and compiled._pool.cache_info().currsize == 1
child = os.fork()
if child == 0:
    os._exit(0 if (sddmm(S, U, V, batched=False) == 6).all() else 1)
for _ in range(200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    __import__("time").sleep(0.1)
print("status", status if done else "hangs")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "status 0\n", done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("solver", ["cholesky", "lsmr"])
@pytest.mark.parametrize("shape", [(40,), (40, 3)])
def test_gradients_of_a_solve(solver, shape, calls, monkeypatch):
    g = torch.Generator().manual_seed(3)
    row, col = np.repeat(np.arange(40), 3), (np.arange(120) * 7) % 12
    S = fl.SparsityPattern(row, col, (40, 12))
    values = torch.randn(120, generator=g, dtype=F64)
    b = torch.randn(shape, generator=g, dtype=F64)

    def gradients():
        leaves = values.clone().requires_grad_(), b.clone().requires_grad_()
        x = fl.lstsq(fl.Sparse(S, leaves[0]), leaves[1], solver=solver, rank="full")
        return torch.autograd.grad(x.square().sum(), leaves, create_graph=True), leaves

    (first, second), leaves = gradients()
    twice = torch.autograd.grad(first.square().sum() + second.square().sum(), leaves)
    assert calls
    monkeypatch.setattr(fused, "LEAST", 1 << 60)
    calls.clear()
    (plain, plain_b), leaves = gradients()
    want = torch.autograd.grad(plain.square().sum() + plain_b.square().sum(), leaves)
    assert not calls
    for a, c in zip((first, second, *twice), (plain, plain_b, *want)):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_gradients_in_jax(x64, calls):
    import funclsq.jax as flj

    S, U, V, _ = drawn(2, F64)
    b, values = np.ones(40), np.random.default_rng(0).standard_normal(300)

    def loss(values):
        return (flj.lstsq(flj.Sparse(S, values), b, damp=0.5) ** 2).sum()

    found = x64.jit(x64.grad(loss))(values)
    assert calls
    leaf = torch.from_numpy(values).requires_grad_()
    x = fl.lstsq(fl.Sparse(S, leaf), torch.from_numpy(b), damp=0.5)
    (want,) = torch.autograd.grad(x.square().sum(), leaf)
    np.testing.assert_allclose(np.asarray(found), want.numpy(), rtol=1e-12, atol=1e-12)


# When it is not taken


@pytest.mark.parametrize("batch", [(), (3,)])
def test_little_work_is_left_to_torch(batch, calls, monkeypatch):
    S, U, V, _ = drawn(8, F64, batch)
    work = U.shape[:-2].numel() * S.nnz_unique * 8
    for least, taken in ((work, True), (work + 1, False)):
        monkeypatch.setattr(fused, "LEAST", least)
        calls.clear()
        sddmm(S, U, V, batched=bool(batch))
        assert bool(calls) == taken


@pytest.mark.parametrize("trouble", ["absent", "broken", "told not to compile"])
def test_without_a_numba_that_works_the_plain_way_is_taken(trouble, calls, monkeypatch):
    S, U, V, _ = drawn(8, F64)
    if trouble == "absent":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif trouble == "broken":

        def fails(name):
            raise ImportError("Numba needs NumPy 2.4 or less")

        monkeypatch.setattr(importlib, "import_module", fails)
    else:
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    compiled.loops.cache_clear()
    try:
        found = sddmm(S, U, V, batched=False)
    finally:
        monkeypatch.undo()
        compiled.loops.cache_clear()
    assert not calls
    torch.testing.assert_close(found, sddmm(S, U, V, batched=False), rtol=1e-13, atol=1e-13)


def test_compiles_where_nothing_can_be_kept_on_disk(monkeypatch):
    compiler = numba.njit

    def no_folder(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return compiler(**options)

    monkeypatch.setattr(numba, "njit", no_folder)

    def double(x):
        return 2 * x

    assert loops._compiled()(double)(3) == 6
