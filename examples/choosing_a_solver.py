"""Every solver on problems that favour one or another: time, and how far from the solution.

    python choosing_a_solver.py [--small] [-o picture.png]

Prints a table and draws it: seconds for x, and for x with the gradient.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import scipy.sparse as sp
import torch

import funclsq as fl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_num_threads(1)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "choosing_a_solver.png"
SOLVERS = ["auto", "lsmr", "lsqr", "cgls", "cholesky", "qr"]
DENSE_LIMIT = 2_000_000  # entries up to which a sparse matrix is written out for qr


def grid(side: int, rng: np.random.Generator) -> sp.spmatrix:
    """Samples of 5% of the nodes of a grid, and first differences between all neighbours."""
    n = side * side
    difference = sp.diags([-np.ones(side - 1), np.ones(side - 1)], [0, 1], shape=(side - 1, side))
    eye = sp.eye(side)
    samples = sp.eye(n, format="csr")[rng.choice(n, n // 20, replace=False)]
    return sp.vstack([samples, sp.kron(difference, eye), sp.kron(eye, difference)])


def problems(small: bool) -> dict[str, sp.spmatrix]:
    """Sparse matrices of full column rank, by name."""
    rng = np.random.default_rng(0)
    m, n = (2000, 200) if small else (20_000, 2000)
    random = sp.random(m, n, density=10 / n, random_state=0) + sp.eye(m, n)
    units = sp.diags(10.0 ** rng.uniform(-3, 3, n))
    chain = sp.diags([-np.ones(5 * n - 1), np.ones(5 * n)], [1, 0])
    return {
        "random pattern": random,
        "random, columns in mixed units": random @ units,
        "grid (2-D)": grid(30 if small else 150, rng),
        "chain (1-D)": sp.vstack([chain, 1e-3 * sp.eye(5 * n)]),
    }


def measure(A: sp.spmatrix, solver: str) -> tuple[float, float, float, str]:
    """Seconds for x, seconds with the gradient in all entries and b, error, and a note."""
    A = A.tocoo()
    rng = np.random.default_rng(1)
    pattern = fl.SparsityPattern(A.row, A.col, A.shape)
    values = torch.from_numpy(A.data).requires_grad_()
    truth = torch.from_numpy(rng.standard_normal(A.shape[1]))
    truth = truth / torch.from_numpy(np.sqrt(np.asarray(A.multiply(A).sum(0)).ravel()))
    b = torch.from_numpy(2 * (A @ truth.numpy())).requires_grad_()
    fl.lstsq(fl.Sparse(pattern, values), b, solver=solver, maxiter=1)  # analyse the pattern

    start = time.perf_counter()
    sol = fl.solve(fl.Sparse(pattern, 2 * values), b, solver=solver, maxiter=1000)
    forward = time.perf_counter() - start
    (sol.x**2).sum().backward()
    both = time.perf_counter() - start
    error = float((sol.x.detach() - truth).norm() / truth.norm())
    note = sol.solver if bool(sol.converged) else "did not converge"
    return forward, both, error, note if solver == "auto" or "not" in note else ""


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true")
    parser.add_argument("-o", "--output", default=PICTURE)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", fl.FunclsqWarning)  # the table says what did not converge
    results: dict[str, dict[str, tuple[float, float, float, str]]] = {}
    for name, A in problems(arguments.small).items():
        print(f"\n{name}: {A.shape[0]} x {A.shape[1]}, {A.nnz} entries")
        print(f"  {'solver':10}{'x':>10}{'x and gradient':>18}{'error of x':>14}")
        results[name] = {}
        for solver in SOLVERS:
            if solver == "qr" and A.shape[0] * A.shape[1] > DENSE_LIMIT:
                print(f"  {solver:10}{'would be written out: left out':>42}")
                continue
            forward, both, error, note = results[name][solver] = measure(A, solver)
            print(f"  {solver:10}{forward:9.3f}s{both:17.3f}s{error:14.0e}   {note}")

    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    for axis, (name, rows) in zip(axes.flat, results.items()):
        place = np.arange(len(rows))
        forward, both = (np.array([row[i] for row in rows.values()]) for i in (0, 1))
        axis.hlines(place, forward, both, color="0.7", zorder=1)
        axis.scatter(forward, place, label="x")
        axis.scatter(both, place, label="x and gradient")
        for i, row in enumerate(rows.values()):
            if "not" in row[3]:
                axis.annotate(row[3] + "   ", (row[0], i), ha="right", va="center", fontsize=8)
        axis.set_yticks(place, rows.keys())
        axis.set(xscale="log", title=name, ylim=(len(rows) - 0.5, -0.5))
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("seconds")
    axes[0, 0].legend()
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
