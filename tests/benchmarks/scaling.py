"""Time against nonzeros, right-hand sides, batch size and threads; products against plain torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import funclsq as fl
from funclsq import fused, passes
from funclsq.entries import sddmm
from funclsq.operators import SparseStructure
from tests.benchmarks.problems import Problem, grid, random_rows
from tests.benchmarks.suite import log
from tests.benchmarks.timing import once

__all__ = ["products", "scaling"]

_seeds = itertools.count()


def scaling(quick: bool, repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """x and gradient: against nonzeros, k, batch size and threads."""
    out: dict[str, list[dict[str, Any]]] = {"nnz": [], "k": [], "batch": [], "threads": []}
    sizes = [int(10**p) for p in np.arange(4, 6.1 if quick else 7.1, 0.5)]
    for nnz in sizes if quick else [*sizes, 50_000_000]:
        A = random_rows(nnz // 10, max(20, nnz // 100), 10, spread=0.0)
        for solver in ("auto", "lsmr") if nnz < 1e7 else ("lsmr",):  # auto takes lsmr there
            seconds = _times(A, 1, None, solver, repetitions if nnz < 9e6 else 1)
            out["nnz"].append({"at": A.nnz, "solver": solver, "seconds": seconds})
    A = random_rows(20_000, 2000, 10)
    for k in (1, 2, 4, 8, 16, 32, 64):
        for solver in ("auto", "lsmr", "cholesky"):
            seconds = _times(A, k, None, solver, repetitions)
            out["k"].append({"at": k, "solver": solver, "seconds": seconds})
    A = random_rows(200, 50, 5, spread=0.0)
    for batch in (1, 10, 100, 1000) if quick else (1, 10, 100, 1000, 10_000):
        for solver in ("auto", "lsmr"):
            seconds = _times(A, 1, batch, solver, repetitions)
            out["batch"].append({"at": batch, "solver": solver, "seconds": seconds})
    cores = [t for t in (1, 2, 4, 8, 16) if t <= (os.cpu_count() or 1)]
    before = torch.get_num_threads()
    large = random_rows(300_000, 30_000, 10, spread=0.0)  # enough for two threads
    flat = grid(100 if quick else 200)
    try:
        for threads in cores:
            torch.set_num_threads(threads)
            for solver, A in (("lsmr", large), ("cholesky", flat)):
                seconds = _times(A, 1, None, solver, repetitions, damp=0.01)
                out["threads"].append({"at": threads, "solver": solver, "seconds": seconds})
    finally:
        torch.set_num_threads(before)
    return out


def _times(
    A: Any, k: int, batch: int | None, solver: str, repetitions: int, damp: float = 0.0
) -> list[float]:
    problem = Problem("", A)
    S = fl.SparsityPattern(problem.row, A.indices, A.shape)
    lead = () if batch is None else (batch,)
    seconds = []
    for _ in range(repetitions + 1):
        g = torch.Generator().manual_seed(next(_seeds))  # no values come twice
        noise = torch.randn((*lead, A.nnz), generator=g, dtype=torch.float64)
        values = (torch.from_numpy(A.data) * (1 + 0.01 * noise)).requires_grad_()
        shape = (*lead, A.shape[0], k)
        b = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

        def work(values=values, b=b):
            x = fl.lstsq(fl.Sparse(S, values), b, damp=damp, solver=solver)
            return torch.autograd.grad(x.sum(), (values, b))

        seconds.append(once(work)[0])
    log(f"scaling: nnz {A.nnz}, k {k}, batch {batch}, {solver}: {min(seconds[1:]):.4f} s")
    return seconds[1:]


def products(repetitions: int) -> list[dict[str, Any]]:
    """Products and the sampled outer product, against the plain ways of writing them in torch."""
    rows = []
    for m, n, per_row in ((20_000, 2000, 10), (61_600, 6000, 10)):
        A = random_rows(m, n, per_row)
        for k in (1, 2, 8, 64):
            runs = _product_runs(A, k)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repetitions + 1):
                for name, run in runs.items():
                    times[name].append(once(run)[0])
            for name, seconds in times.items():
                rows.append({"nnz": A.nnz, "k": k, "what": name, "seconds": seconds[1:]})
                log(f"nnz {A.nnz}, k {k:3}: {name:36} {min(seconds[1:]) * 1e6:10.0f} us")
    return rows


def _product_runs(A: Any, k: int) -> dict[str, Callable[[], Any]]:
    m, n = A.shape
    problem = Problem("", A)
    S = fl.SparsityPattern(problem.row, A.indices, A.shape)
    row, col = (torch.from_numpy(i.astype(np.int64)) for i in (problem.row, A.indices))
    values = torch.from_numpy(A.data)
    op = SparseStructure(S).bind((values,))
    coo = torch.sparse_coo_tensor(torch.stack([row, col]), values, A.shape, is_coalesced=True)
    X, Y = torch.rand(n, k, dtype=torch.float64), torch.rand(m, k, dtype=torch.float64)

    def gathered() -> torch.Tensor:
        return (Y.index_select(0, row) * X.index_select(0, col)).sum(1)

    def without_numba() -> torch.Tensor:
        least, fused.LEAST = fused.LEAST, 1 << 60
        try:
            return sddmm(S, Y, X, batched=False)
        finally:
            fused.LEAST = least

    least, passes.LEAST = passes.LEAST, 1 << 60
    plain = SparseStructure(S).bind((values,))
    plain.passes()  # asked once
    passes.LEAST = least
    products = {
        "A X": lambda: op.mv(X),
        "A X, without numba": lambda: plain.mv(X),
        "A X, torch COO": lambda: coo @ X,
        "A^T Y": lambda: op.rmv(Y),
        "A^T Y, without numba": lambda: plain.rmv(Y),
        "A^T Y, torch COO": lambda: coo.t() @ Y,
    }
    if k > 1:  # left to torch
        products = {name: run for name, run in products.items() if "without" not in name}
    sampled = {
        "sampled Y X^T": lambda: sddmm(S, Y, X, batched=False),
        "sampled Y X^T, without numba": without_numba,
        "sampled Y X^T, gather and multiply": gathered,
    }
    return (products if k in (1, 64) else {}) | sampled
