"""An LSMR iteration against its products and vector updates by hand, and the bandwidth floor."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import funclsq as fl
from funclsq import passes
from funclsq.operators import SparseStructure
from tests.benchmarks.problems import Problem, random_rows
from tests.benchmarks.suite import log
from tests.benchmarks.timing import once

__all__ = ["bandwidth", "beyond_products", "by_hand", "iteration"]

FEW, MANY = 5, 25  # iterations; the difference is free of what a solve costs besides


def bandwidth(repetitions: int = 7) -> float:
    """Bytes per second of a triad a = b + s c on 3 x 64 MB, on this machine with these threads."""
    b, c = (torch.rand(8_000_000, dtype=torch.float64) for _ in range(2))
    a = torch.empty_like(b)
    seconds = [once(lambda: torch.add(b, c, alpha=1.5, out=a))[0] for _ in range(repetitions)]
    return 3 * a.numel() * 8 / min(seconds)


def iteration(sizes: tuple[int, ...], repetitions: int, speed: float) -> list[dict[str, Any]]:
    """Seconds per iteration, by hand and at the least, for matrices of 10 entries per row."""
    rows = []
    for nnz in sizes:
        rows.append(_one_size(nnz, repetitions, speed))
        each, hand, floor = rows[-1]["iteration"], rows[-1]["by_hand"], rows[-1]["floor"]
        log(
            f"nnz {nnz:9}: an iteration {statistics.median(each) * 1e6:9.0f} us, by hand "
            f"{statistics.median(hand) * 1e6:9.0f} us, with torch's products "
            f"{statistics.median(rows[-1]['by_hand_torch']) * 1e6:9.0f} us, "
            f"floor {floor * 1e6:9.0f} us, "
            f"ratio {rows[-1]['ratio']:.2f}"
        )
    return rows


def beyond_products(repetitions: int) -> list[dict[str, Any]]:
    """What an iteration on 2,000 unknowns takes beyond its two products: vectors, and the rest.

    The rest is Python: the rotations and the tests for an end, on numbers that two norms gave.
    """
    rows = []
    for m, per_row in ((3000, 5), (3000, 10), (20000, 10)):
        A = random_rows(m, 2000, per_row, spread=0.0)
        solve, op = _solver(A)
        hands, products = by_hand(op), _products(op)
        each, hand, pure = [], [], []
        for repetition in range(repetitions):
            scale = 1 + 0.01 * (repetition + 1)
            short, long = [], []
            for i in range(3):
                short.append(once(solve, 4, scale + 0.001 * i)[0])
                long.append(once(solve, 16, scale + 0.001 * i + 0.005)[0])
            each.append((min(long) - min(short)) / 12)
            hand.append(min(once(hands, 20)[0] for _ in range(3)) / 20)
            pure.append(min(once(products, 20)[0] for _ in range(3)) / 20)
        middle = statistics.median
        rows.append(
            {
                "nnz": A.nnz,
                "iteration": middle(each),
                "products": middle(pure),
                "vectors": middle(h - p for h, p in zip(hand, pure)),
                "beyond": middle(e - p for e, p in zip(each, pure)),
            }
        )
        log(f"beyond the products of {A.nnz} entries: {rows[-1]['beyond'] * 1e6:.0f} us")
    return rows


def _solver(A: Any) -> tuple[Callable[[int, float], Any], Any]:
    """``solve(maxiter, scale)`` by LSMR on A times a number, and the products that it makes."""
    S = fl.SparsityPattern(Problem("", A).row, A.indices, A.shape)
    values = torch.from_numpy(A.data)
    b = torch.rand(A.shape[0], dtype=torch.float64)

    def solve(maxiter: int, scale: float) -> Any:
        options: dict[str, Any] = {"solver": "lsmr", "rank": "full", "on_failure": "ignore"}
        options |= {"maxiter": maxiter, "atol": 0.0, "btol": 0.0}
        return fl.lstsq(fl.Sparse(S, values * scale), b, **options)

    return solve, SparseStructure(S).bind((values,))


def _one_size(nnz: int, repetitions: int, speed: float) -> dict[str, Any]:
    m, n = nnz // 10, nnz // 15  # slow to converge: no solve ends before MANY iterations
    A = random_rows(m, n, 10, spread=0.0)
    solve, op = _solver(A)
    ways = {"by_hand": by_hand(op), "by_hand_torch": by_hand(_by_torch(op))}
    solve(FEW, 0.9)
    found: dict[str, list[float]] = {"iteration": [], **{name: [] for name in ways}}
    for hands in ways.values():
        hands(1)
    for repetition in range(repetitions):
        scale = 1 + 0.01 * (repetition + 1)
        short, long = [], []
        plain: dict[str, list[float]] = {name: [] for name in ways}
        for i in range(3):
            short.append(once(solve, FEW, scale + 0.001 * i)[0])
            for name, hands in ways.items():
                plain[name].append(once(hands, MANY - FEW)[0] / (MANY - FEW))
            long.append(once(solve, MANY, scale + 0.001 * i + 0.005)[0])
        found["iteration"].append((min(long) - min(short)) / (MANY - FEW))
        for name, seconds in plain.items():
            found[name].append(min(seconds))
    each, hand = found["iteration"], found["by_hand"]
    if op.passes() is None:
        # values and int32 columns of A and of A^T and their row starts, then vectors: a product
        # reads one and writes one; 2 updates of u (5), 2 of v (5), a norm each, h, hbar, x (9)
        moved = A.nnz * 24 + (m + n) * 4 + 8 * (8 * m + 17 * n)
    else:
        # values and columns of A, its row starts, u read and written; v read, A^H u cleared and
        # added to (3), turned (3), then v, h, hbar and x read and written
        moved = A.nnz * 12 + m * 4 + 8 * (2 * m + 15 * n)
    return {
        "nnz": A.nnz,
        **found,
        "floor": moved / speed,
        "ratio": statistics.median(a / h for a, h in zip(each, hand)),
    }


def _by_torch(op: Any) -> Any:
    """The same operator, with torch's products whatever there is."""
    least, passes.LEAST = passes.LEAST, 1 << 60
    try:
        other = type(op)(op.pattern, op.csr_values)
        other.passes()  # asked once
    finally:
        passes.LEAST = least
    return other


def by_hand(op: Any, device: str = "cpu") -> Callable[[int], None]:
    """The two products and the vector updates of LSMR, with constants for its scalars.

    The norms are handed to Python on the CPU, and stay on another device.
    """
    m, n = op.shape
    kind: dict[str, Any] = {"dtype": torch.float64, "device": device}
    u, u_next = (torch.rand(m, 1, **kind) for _ in range(2))
    v, v_next, h, hbar, x = (torch.rand(n, 1, **kind) for _ in range(5))
    scalar = torch.empty((), **kind)

    def norm(t: torch.Tensor) -> None:
        if device == "cpu":
            torch.linalg.vector_norm(t).item()
        else:
            torch.linalg.vector_norm(t, out=scalar)

    def run(count: int) -> None:
        a, b = u, u_next
        for _ in range(count):
            op.mv(v, out=b)
            b.add_(a, alpha=-0.5)
            norm(b)
            b.mul_(0.99)
            op.rmv(b, out=v_next)
            v_next.add_(v, alpha=-0.5)
            norm(v_next)
            v_next.mul_(0.01)
            torch.add(h, hbar, alpha=0.5, out=hbar)
            x.add_(hbar, alpha=0.5)
            torch.add(v, h, alpha=0.5, out=h)
            a, b = b, a

    return run


def _products(op: Any) -> Callable[[int], None]:
    """The two products of an iteration, and nothing else."""
    m, n = op.shape
    u, v = torch.rand(m, 1, dtype=torch.float64), torch.rand(n, 1, dtype=torch.float64)
    u_next, v_next = torch.empty_like(u), torch.empty_like(v)

    def run(count: int) -> None:
        for _ in range(count):
            op.mv(v, out=u_next)
            op.rmv(u, out=v_next)

    return run
