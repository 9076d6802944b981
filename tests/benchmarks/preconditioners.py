"""Iterations and times with each preconditioner: ``python -m tests.benchmarks.preconditioners``.

Every time is that of making the preconditioner and solving by lsmr, for a matrix whose values are
new. All solve to one tolerance; the error is that of x against the complete factor.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

import funclsq as fl
from tests.benchmarks.problems import Problem, _csr, bundle, grid, random_rows, tomography
from tests.benchmarks.timing import once, ratios

TOLERANCE = 1e-10
MAXITER = 5000
Maker = Callable[..., Any]


def grid_3d(side: int) -> sp.csr_array:
    """First differences between neighbours of a cube: its factor fills."""
    D = sp.diags_array(
        [-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1], shape=(side - 1, side)
    )
    eye = sp.eye_array(side)
    axes = [(D, eye, eye), (eye, D, eye), (eye, eye, D)]
    return _csr(sp.vstack([sp.kron(a, sp.kron(b, c)) for a, b, c in axes]))


def in_units(A: sp.csr_array, label: np.ndarray, decades: float, seed: int = 0) -> sp.csr_array:
    """Mix the columns of each block, and stretch the mixtures over some decades."""
    rng = np.random.default_rng(seed)
    size = np.bincount(label)
    mixtures = [
        np.linalg.qr(rng.standard_normal((s, s)))[0]
        * np.logspace(0, decades, s)
        @ np.linalg.qr(rng.standard_normal((s, s)))[0]
        for s in size
    ]
    return _csr(A @ sp.block_diag(mixtures, format="csr"))


def very_tall(m: int, n: int, per_row: int) -> sp.csr_array:
    """Sparse rows of second differences: the condition number grows with n^2."""
    L = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(n, n))
    return _csr(random_rows(m, n, per_row, spread=0.0) @ L)


def problems() -> list[tuple[Problem, np.ndarray | int]]:
    """Each problem with the blocks of its columns."""
    cameras, points = 20, 1500
    label = np.repeat(np.arange(cameras + points), [9] * cameras + [3] * points)
    arrow = bundle(cameras, points, 5)[: 2 * 5 * points]
    return [
        (Problem("grid 40k, damped", grid(200), damp=0.01), 8),
        (Problem("grid 30^3, damped", grid_3d(30), damp=0.01), 8),
        (Problem("bundle adjustment, units over 1.5 decades", in_units(arrow, label, 1.5)), label),
        (Problem("tomography 48 x 48, damped", tomography(48, 70), damp=0.1), 48),
        (Problem("very tall, second differences", very_tall(100_000, 200, 5)), 20),
    ]


def contestants(blocks: Any) -> dict[str, tuple[Maker | None, dict[str, Any]]]:
    """How each makes its preconditioner, and settings of the solve."""
    p = fl.preconditioners
    return {
        "none, no scaling": (None, {"scale": False}),
        "column scaling": (None, {}),
        "block_diagonal": (lambda A, **more: p.block_diagonal(A, blocks, **more), {}),
        "incomplete": (p.incomplete, {}),
        "sketch": (p.sketch, {}),
        "complete factor": (lambda A, **more: fl.factorize(A, solver="cholesky", **more), {}),
    }


def measure(problem: Problem, blocks: Any, repetitions: int) -> None:
    """Print one row per contestant: iterations, error, seconds, and the ratio to no scaling."""
    m, n = problem.A.shape
    print(f"\n{problem.name}: {m} x {n}, {problem.A.nnz} entries", flush=True)
    S = fl.SparsityPattern(problem.row, problem.A.indices, problem.A.shape)
    more = {"damp": problem.damp}

    def run(make: Maker | None, settings: dict[str, Any], seed: int) -> tuple[float, float, Any]:
        data = problem.draw(seed)
        A, b = fl.Sparse(S, torch.from_numpy(data.values)), torch.from_numpy(data.b)
        setup, P = (0.0, None) if make is None else once(lambda: make(A, **more))
        solving, sol = once(
            lambda: fl.solve(
                A,
                b,
                solver="lsmr",
                rank="full",
                atol=TOLERANCE,
                btol=TOLERANCE,
                maxiter=MAXITER,
                on_failure="ignore",
                preconditioner=P,
                **more,
                **settings,
            )
        )
        return setup, solving, sol

    table = contestants(blocks)
    if m <= 4 * n or n > 4000:
        del table["sketch"]
    run(None, {}, 1)  # what is made once per pattern
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    found: dict[str, Any] = {}
    for repetition in range(repetitions):  # interleaved, each with values that nobody saw before
        for i, (name, (make, settings)) in enumerate(table.items()):
            seed = 1000 * (i + 1) + repetition
            setup, solving, found[name] = run(make, settings, seed)
            times[name].append((setup, solving))
            if repetition == 0:
                data = problem.draw(seed)
                A = fl.Sparse(S, torch.from_numpy(data.values))
                exact = fl.lstsq(A, torch.from_numpy(data.b), solver="cholesky", **more)
                error = float((found[name].x - exact).norm() / exact.norm())
                steps, status = int(found[name].iterations), int(found[name].status)
                found[name] = steps, fl.Status(status).name, error
                print(f"  {name:20} {steps:5} {found[name][1]:22} {error:8.1e}", flush=True)
    base = [sum(t) for t in times["none, no scaling"]]
    print(f"  {'':20} {'set up':>8} {'solve':>8}   against none (least-greatest)")
    for name, each in times.items():
        setup, solving = (statistics.median(t) for t in zip(*each))
        middle, least, most = ratios([sum(t) for t in each], base)
        print(f"  {name:20} {setup:8.3f} {solving:8.3f}   {middle:.3f} ({least:.3f}-{most:.3f})")


def main() -> None:
    """Measure all problems, or those whose name begins with a given word."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of the names of problems")
    parser.add_argument("--repetitions", type=int, default=3)
    a = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for problem, blocks in problems():
        if not a.names or problem.name.startswith(tuple(a.names)):
            measure(problem, blocks, a.repetitions)


if __name__ == "__main__":
    main()
