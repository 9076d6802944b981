"""Time against nonzeros, right-hand sides and batch size, with the bandwidth floor of the machine."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

import funclsq as fl
from funclsq.operators import SparseStructure
from funclsq.products import sddmm_csr
from funclsq.operators import _csr as csr_of
from tests.benchmarks.problems import Problem, random_rows
from tests.benchmarks.suite import log
from tests.benchmarks.timing import once

__all__ = ["bandwidth", "iteration", "products", "scaling"]


def bandwidth(repetitions: int = 7) -> float:
    """Bytes per second of a triad a = b + s c on 3 x 64 MB, on this machine with these threads."""
    b, c = (torch.rand(8_000_000, dtype=torch.float64) for _ in range(2))
    a = torch.empty_like(b)
    seconds = [once(lambda: torch.add(b, c, alpha=1.5, out=a))[0] for _ in range(repetitions)]
    return 3 * a.numel() * 8 / min(seconds)


def iteration(sizes: tuple[int, ...], repetitions: int, speed: float) -> list[dict[str, Any]]:
    """One LSMR iteration against its two products and vector traffic, timed in the same run.

    The floor is the bytes that an iteration must move, over the measured bandwidth: values and
    indices of A and of A^T once each, gathered vectors once, and 21 reads and writes of vectors.
    """
    rows = []
    for nnz in sizes:
        m, n = nnz // 10, max(100, nnz // 100)
        A = random_rows(m, n, 10, spread=0.0)
        nnz = A.nnz
        problem = Problem("", A)
        S = fl.SparsityPattern(problem.row, A.indices, A.shape)
        op = SparseStructure(S).bind((torch.from_numpy(A.data),))
        x, y = torch.rand(n, 1, dtype=torch.float64), torch.rand(m, 1, dtype=torch.float64)
        u, v = torch.empty_like(y), torch.empty_like(x)
        ms = [torch.rand(m, 1, dtype=torch.float64) for _ in range(2)]
        ns = [torch.rand(n, 1, dtype=torch.float64) for _ in range(4)]
        few, many = 5, 15
        values, b = torch.from_numpy(A.data), y[:, 0]

        def solve(maxiter: int, data: torch.Tensor) -> Any:
            A_ = fl.Sparse(S, data)
            return fl.lstsq(
                A_, b, solver="lsmr", rank="full", maxiter=maxiter, atol=0, btol=0,
                on_failure="ignore",
            )  # fmt: skip

        def by_hand() -> None:
            op.mv(x, out=u)
            u.add_(ms[0], alpha=-0.5)
            torch.linalg.vector_norm(u).item()
            u.mul_(0.99)
            op.rmv(y, out=v)
            v.add_(ns[0], alpha=-0.5)
            torch.linalg.vector_norm(v).item()
            v.mul_(0.99)
            torch.add(ns[0], ns[1], alpha=0.5, out=ns[1])
            ns[2].add_(ns[1], alpha=0.5)
            torch.add(v, ns[3], alpha=0.5, out=ns[3])

        solve(few, values), by_hand()
        each, hand = [], []
        for repetition in range(repetitions):
            scale = 1 + 0.01 * (repetition + 1)
            short = once(solve, few, values * scale)[0]
            long = once(solve, many, values * (scale + 0.005))[0]
            each.append((long - short) / (many - few))
            hand.append(min(once(by_hand)[0] for _ in range(5)))
        floor = (nnz * (12 + 12) + (m + n) * (4 + 8) + 8 * (8 * m + 13 * n)) / speed
        rows.append(
            {
                "nnz": nnz,
                "iteration": each,
                "by_hand": hand,
                "floor": floor,
                "ratio": statistics.median(a / h for a, h in zip(each, hand)),
            }
        )
        log(
            f"nnz {nnz:9}: an iteration {statistics.median(each) * 1e6:9.0f} us, by hand "
            f"{statistics.median(hand) * 1e6:9.0f} us, floor {floor * 1e6:9.0f} us, "
            f"ratio {rows[-1]['ratio']:.2f}"
        )
    return rows


def scaling(quick: bool, repetitions: int) -> dict[str, list[dict[str, Any]]]:
    """x and gradient by the default solver: against nonzeros, k and batch size."""
    out: dict[str, list[dict[str, Any]]] = {"nnz": [], "k": [], "batch": []}
    top = 6 if quick else 7
    for nnz in (int(10**p) for p in np.arange(4, top + 0.1, 0.5)):
        A = random_rows(nnz // 10, max(20, nnz // 100), 10, spread=0.0)
        for solver in ("auto", "lsmr"):
            seconds = _times(A, 1, None, solver, repetitions)
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
    return out


def _times(A, k: int, batch: int | None, solver: str, repetitions: int) -> list[float]:
    problem = Problem("", A)
    S = fl.SparsityPattern(problem.row, A.indices, A.shape)
    lead = () if batch is None else (batch,)
    seconds = []
    for repetition in range(repetitions + 1):
        g = torch.Generator().manual_seed(repetition)
        noise = torch.randn((*lead, A.nnz), generator=g, dtype=torch.float64)
        values = (torch.from_numpy(A.data) * (1 + 0.01 * noise)).requires_grad_()
        shape = (*lead, A.shape[0], k)
        b = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

        def work(values=values, b=b):
            x = fl.lstsq(fl.Sparse(S, values), b, solver=solver)
            return torch.autograd.grad(x.sum(), (values, b))

        seconds.append(once(work)[0])
    log(f"scaling: nnz {A.nnz}, k {k}, batch {batch}, {solver}: {min(seconds[1:]):.4f} s")
    return seconds[1:]


def products(repetitions: int) -> list[dict[str, Any]]:
    """Products and the sampled outer product, against the plain ways of writing them in torch."""
    rows = []
    for m, n, per_row in ((20_000, 2000, 10), (61_600, 6000, 10)):
        A = random_rows(m, n, per_row)
        problem = Problem("", A)
        S = fl.SparsityPattern(problem.row, A.indices, A.shape)
        row, col = (torch.from_numpy(i.astype(np.int64)) for i in (problem.row, A.indices))
        values = torch.from_numpy(A.data)
        op = SparseStructure(S).bind((values,))
        coo = torch.sparse_coo_tensor(torch.stack([row, col]), values, A.shape, is_coalesced=True)
        zeros = csr_of(S, torch.float64, torch.device("cpu"))
        for k in (1, 64):
            X = torch.rand(n, k, dtype=torch.float64)
            Y = torch.rand(m, k, dtype=torch.float64)

            def gathered(Y=Y, X=X):
                return (Y.index_select(0, row) * X.index_select(0, col)).sum(1)

            runs = {
                "A X": lambda X=X: op.mv(X),
                "A X, torch COO": lambda X=X: coo @ X,
                "A^T Y": lambda Y=Y: op.rmv(Y),
                "A^T Y, torch COO": lambda Y=Y: coo.t() @ Y,
                "sampled Y X^T": lambda X=X, Y=Y: sddmm_csr(zeros, Y, X),
                "sampled Y X^T, gather and multiply": gathered,
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(repetitions + 1):
                for name, run in runs.items():
                    times[name].append(once(run)[0])
            for name, seconds in times.items():
                rows.append({"nnz": A.nnz, "k": k, "what": name, "seconds": seconds[1:]})
                log(f"nnz {A.nnz}, k {k:3}: {name:36} {min(seconds[1:]) * 1e6:10.0f} us")
    return rows
