"""Threads, processes, copies and long runs: nothing is shared that should not be, or kept."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data

import funclsq as fl
from funclsq import kept, plan, raw

THREADS = 16


def problem(m=300, n=160, seed=0):
    """Large enough for auto to keep a sparse factor."""
    rng = np.random.default_rng(seed)
    row = np.concatenate((np.arange(n), rng.integers(0, m, 4 * n)))
    col = np.concatenate((np.arange(n), rng.integers(0, n, 4 * n)))
    values = torch.from_numpy(rng.standard_normal(row.size))
    return fl.SparsityPattern(row, col, (m, n)), values, torch.from_numpy(rng.standard_normal(m))


def matvec(params, v):
    return params[0] @ v


def rmatvec(params, u):
    return params[0].mH @ u


def in_threads(work):
    """Run work(i) in all threads at once, and return the results."""
    barrier = threading.Barrier(THREADS)

    def run(i):
        barrier.wait()
        return work(i)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


@pytest.mark.parametrize("solver", ["auto", "cholesky", "lsmr", "qr"])
def test_threads_share_a_pattern_and_a_factor(solver):
    S, values, b = problem()
    bs = [b + i for i in range(THREADS)]

    def work(i):
        leaf = values.clone().requires_grad_()
        x = fl.lstsq(fl.Sparse(S, leaf), bs[i], solver=solver)
        (bar,) = torch.autograd.grad(x.square().sum(), leaf)
        return x.detach(), bar

    raw.clear_cache()
    together = in_threads(work)
    raw.clear_cache()
    for i, (x, bar) in enumerate(together):
        alone, bar_alone = work(i)
        torch.testing.assert_close(x, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(bar, bar_alone, rtol=1e-8, atol=1e-9)


def test_the_thread_that_loads_a_backend_may_end():
    """A native allocator may live and die with the thread that loads it (see lasting.py)."""
    script = """
import sys, threading
import numpy as np, torch
import funclsq as fl

def work():
    rng = np.random.default_rng(0)
    row, col = rng.integers(0, 300, 800), rng.integers(0, 160, 800)
    row, col = np.append(row, np.arange(160)), np.append(col, np.arange(160))
    A = fl.Sparse(fl.SparsityPattern(row, col, (300, 160)), torch.randn(960).double())
    for _ in range(3):
        fl.lstsq(A, torch.randn(300).double(), solver="cholesky")

for count in (1, 16, 16):
    threads = [threading.Thread(target=work) for _ in range(count)]
    [t.start() for t in threads], [t.join() for t in threads]
work()
print("well")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "well\n", done.stderr[-2000:]


def test_threads_with_values_of_their_own_do_not_meet():
    S, values, b = problem()

    def work(i):
        return [fl.lstsq(fl.Sparse(S, (i + 1) * values), b, solver="cholesky") for _ in range(3)]

    x = fl.lstsq(fl.Sparse(S, values), b, solver="cholesky")
    for i, found in enumerate(in_threads(work)):
        for y in found:
            torch.testing.assert_close((i + 1) * y, x, rtol=1e-10, atol=1e-12)


def test_threads_share_a_factorization():
    S, values, b = problem()
    f = fl.factorize(fl.Sparse(S, values))
    want = f.solve(b)
    for i, x in enumerate(in_threads(lambda i: f.solve((i + 1) * b))):
        torch.testing.assert_close(x, (i + 1) * want, rtol=1e-10, atol=1e-12)


# Copies


def objects():
    S, values, b = problem(12, 5)
    A = fl.Sparse(S, values)
    L = fl.LinearOperator(matvec, (12, 5), (A.to_dense(),), rmatvec=rmatvec)
    return {
        "SparsityPattern": S,
        "Sparse": A,
        "LinearOperator": L,
        "Solution": fl.solve(A, b),
        "Factorization": fl.factorize(A, damp=0.5),
        "LinearRegression": fl.linear_regression(A.to_dense(), b),
        "Status": fl.Status.DIRECT,
    }


def through_torch(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def test_every_public_class_is_here():
    classes = {n for n in fl.__all__ if isinstance(getattr(fl, n), type)}
    exceptions = {n for n in classes if issubclass(getattr(fl, n), Exception)}
    assert classes - exceptions - {"Method"} == set(objects())


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize("name", objects())
def test_a_copy_does_what_the_original_does(name, way):
    thing = objects()[name]
    other = way(thing)
    assert type(other) is type(thing)
    b = torch.arange(12, dtype=torch.float64)
    if name == "SparsityPattern":
        assert other == thing
        assert hash(other) == hash(thing)
    elif name in ("Sparse", "LinearOperator"):
        assert torch.equal(fl.lstsq(other, b), fl.lstsq(thing, b))
    elif name == "Solution":
        assert torch.equal(other.x, thing.x)
        assert other.message == thing.message
    elif name == "Factorization":
        assert torch.equal(other.solve(b), thing.solve(b))
    elif name == "LinearRegression":
        assert str(other) == str(thing)
    else:
        assert other is thing


@functools.cache
def of_a_submodule(name):
    """An object, and a function that shows what it does."""
    S, values, b = problem(12, 5)
    A = fl.Sparse(S, values).to_dense()
    unknown = torch.ones(5, 1, dtype=torch.float64)
    if name in ("Descent", "History"):
        descent = fl.solvers.gradient_descent(A, b, history=True, maxiter=20, on_failure="ignore")
        if name == "Descent":
            return descent, lambda d: (d.x, d.history.residual_norm)
        return descent.history, lambda h: (h.residual_norm, h.normal_residual_norm)
    if name == "Preconditioner":
        return fl.preconditioners.incomplete(A), lambda P: (P.solve_normal(unknown),)
    if name == "LeastSquares":
        layer = fl.nn.LeastSquares(A, damp=0.5, trainable=("damp",))
        return layer, lambda layer: (layer(b).detach(),)
    if name == "RidgePath":
        path = fl.ridge.ridge_path(A, b, torch.logspace(-2, 1, 7, dtype=torch.float64))
        return path, lambda path: (path.x, path.solution_norm)
    report = fl.validate.cross_check(A, b, oracles=["closed form"])
    return report, lambda report: (torch.tensor([row.error for row in report.rows]),)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, through_pickle, through_torch])
@pytest.mark.parametrize(
    "name", ["Descent", "History", "Preconditioner", "LeastSquares", "RidgePath", "Report"]
)
def test_a_copy_of_what_submodules_make_does_the_same(name, way):
    thing, shown = of_a_submodule(name)
    other = way(thing)
    assert type(other) is type(thing)
    for got, want in zip(shown(other), shown(thing), strict=True):
        assert torch.equal(got, want)


def test_a_deep_copy_of_a_matrix_has_values_of_its_own():
    A = objects()["Sparse"]
    other = copy.deepcopy(A)
    other.values.zero_()
    assert bool(A.values.any())
    assert other.pattern is A.pattern


# Processes


class Problems(torch.utils.data.Dataset):
    """A data set of which each item is solved in the worker that reads it."""

    def __init__(self):
        self.pattern, self.values, self.b = problem(40, 12)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return fl.lstsq(fl.Sparse(self.pattern, self.values), (i + 1.0) * self.b)


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on one CPU
def test_data_loader_workers(context):
    data = Problems()
    here = torch.stack([data[i] for i in range(len(data))])
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=4,
        num_workers=2 if context == "fork" else 1,
        multiprocessing_context=context,
        timeout=120,
    )
    torch.testing.assert_close(torch.cat(list(loader)), here, rtol=1e-12, atol=1e-13)


# Long runs


def test_caches_are_bounded():
    patterns = []
    for i in range(60):
        S, values, b = problem(20, 8, seed=i)
        patterns.append(S)
        fl.lstsq(fl.Sparse(S, values), b)
        fl.lstsq(fl.Sparse(S, values.expand(i % 9 + 1, -1)), b)
    assert len(kept._recent) <= 16
    assert len(plan._plans) <= 32
    S = patterns[-1]
    for i in range(1, 20):
        values = torch.ones(i, S.nnz, dtype=torch.float64)
        fl.lstsq(fl.Sparse(S, values), torch.ones(20, dtype=torch.float64), solver="cholesky")
    assert len(S.cache) < 30


def test_thousands_of_calls_leave_nothing_behind():
    S, values, b = problem(20, 8)

    def work(count):
        for i in range(count):
            leaf = (values + 1e-3 * i).requires_grad_()
            x = fl.lstsq(fl.Sparse(S, leaf), b)
            x.sum().backward()
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gc.get_objects touches deprecated attributes
        before = work(100)
        after = work(1000)
    assert after <= before + 5


@pytest.mark.slow
def test_ten_thousand_calls_do_not_grow():
    """Resident memory, after a start, over 10,000 gradients with new values and patterns."""
    script = """
import os, sys
import torch
sys.path.insert(0, sys.argv[1])
import funclsq as fl
from test_concurrency import problem

def resident():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for i in range(12_000):
    if i % 10 == 0:
        S, values, b = problem(20, 8, seed=i)
    leaf = (values + 1e-3 * i).requires_grad_()
    fl.lstsq(fl.Sparse(S, leaf), b, solver=("auto", "cholesky", "lsmr")[i % 3]).sum().backward()
    if i == 2_000:
        before = resident()
print((resident() - before) >> 20)
"""
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", script, here]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    assert int(done.stdout) < 8  # MiB


def test_a_pattern_that_is_gone_takes_its_plans_along():
    raw.clear_cache()
    S, values, b = problem(20, 8)
    fl.lstsq(fl.Sparse(S, values), b)
    seen = weakref.ref(S)
    del S
    for i in range(40):  # as many others as plans are kept
        T, other, c = problem(20, 8, seed=i + 1)
        fl.lstsq(fl.Sparse(T, other), c)
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("solver", ["auto", "cholesky", "lsmr", "lsqr", "cgls", "qr", "svd"])
def test_the_same_bits_from_run_to_run(solver):
    S, values, b = problem()

    def work():
        raw.clear_cache()
        leaf = values.clone().requires_grad_()
        x = fl.lstsq(fl.Sparse(S, leaf), torch.stack((b, 2 * b - 1), 1), solver=solver)
        return x, *torch.autograd.grad(x.square().sum(), leaf)

    first = work()
    for _ in range(3):
        assert all(map(torch.equal, work(), first))
