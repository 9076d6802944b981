"""The four pictures of funclsq.plot, of one problem: a noisy signal, blurred, and its restoration.

python plots.py [-o picture.png]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import funclsq as fl
from funclsq import plot
from funclsq.ridge import ridge_path
from funclsq.validate import cross_check

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "plots.png"
N = 60


def problem() -> tuple[fl.Sparse, torch.Tensor]:
    """A blur of nine neighbours, and what it makes of a step and a wave."""
    i, k = torch.arange(N)[:, None], torch.arange(-4, 5)
    inside = (i + k >= 0) & (i + k < N)
    pattern = fl.SparsityPattern(i.expand(N, 9)[inside], (i + k)[inside], (N, N))
    A = fl.Sparse(pattern, torch.exp(-((k / 2.0) ** 2)).expand(N, 9)[inside])
    signal = (torch.arange(N) > N // 3).double() + torch.sin(torch.arange(N) / 8)
    return A, A @ signal + 0.02 * torch.randn(N)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=PICTURE)
    output = parser.parse_args().output

    A, b = problem()
    figure, axes = plt.subplots(2, 2, figsize=(9.6, 7.6), layout="constrained")
    plot.sparsity(A, axes[0, 0])
    for solver in ("lsmr", "lsqr", "cgls"):
        states: list[dict] = []
        fl.lstsq(A, b, damp=0.05, solver=solver, callback=states.append)
        plot.convergence(states, axes[0, 1], label=solver)
        print(f"{solver}: {len(states)} steps")
    path = ridge_path(A, b, torch.logspace(-5, 1, 80))
    plot.l_curve(path, axes[1, 0])
    print(f"corner of the L-curve: damp {float(path.damp[path.corner]):.3g}")
    report = cross_check(A, b, damp=0.05)
    plot.gradient_agreement(report, axes[1, 1])
    print(str(report).splitlines()[-1])
    figure.savefig(output, dpi=120)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
