"""One problem A x = y stated three ways for an optimiser, and as a problem for a solver.

    python formulations.py [-o picture.png]

A is 100 x 20, Gaussian. The tutorial on least squares in PyTorch trains x by SGD (lr 1e-3, 200
epochs) as the input of a frozen nn.Linear, as the nn.Parameter of a module, and as a tensor with
requires_grad. funclsq.solvers.gradient_descent makes the same steps, and others; lstsq needs none.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

import funclsq as fl
from funclsq import plot
from funclsq.nn import LeastSquares, Objective

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LR, EPOCHS = 1e-3, 200
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
A, y = torch.randn(100, 20), torch.randn(100)
exact = torch.from_numpy(np.linalg.lstsq(A.numpy(), y.numpy())[0])


def train(x: torch.Tensor, loss) -> torch.Tensor:
    """SGD on x; checks the gradient against 2 A^T (A x - y) at every step; returns the path."""
    sgd = torch.optim.SGD([x], lr=LR)
    path = [x.detach().clone()]
    for _ in range(EPOCHS):
        sgd.zero_grad()
        loss().backward()
        formula = 2 * A.T @ (A @ x.detach().view(-1) - y)
        assert (x.grad.view(-1) - formula.view(-1)).abs().max() < 1e-4
        sgd.step()
        path.append(x.detach().clone())
    return torch.stack(path).view(EPOCHS + 1, -1)


def formulations() -> dict[str, torch.Tensor]:
    """Give the paths of the three ways to state the problem."""
    linear = nn.Linear(20, 100, bias=False)
    linear.weight = nn.Parameter(A, requires_grad=False)
    x1 = torch.zeros(1, 20, requires_grad=True)
    module = Objective(LeastSquares(A, y))
    x3 = torch.zeros(20, requires_grad=True)
    return {
        "nn.Linear, frozen weight": train(x1, lambda: ((linear(x1) - y) ** 2).sum()),
        "nn.Module with a Parameter": train(module.x, module),
        "tensor with requires_grad": train(x3, lambda: ((A @ x3 - y) ** 2).sum()),
    }


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "docs" / "assets" / "formulations.png"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=default)
    arguments = parser.parse_args()

    s = torch.linalg.svdvals(A)
    L, mu = float(2 * s[0] ** 2), float(2 * s[-1] ** 2)
    kappa = float(s[0] / s[-1])
    descend = functools.partial(
        fl.solvers.gradient_descent, A, y, history=True, on_failure="ignore", maxiter=EPOCHS
    )
    beta = ((kappa - 1) / (kappa + 1)) ** 2
    root = (kappa - 1) / (kappa + 1)
    ball = {"step": (2 / (L**0.5 + mu**0.5)) ** 2, "momentum": beta}
    paths = {  # name: path, textbook rate of the error per step
        **{k: (v, 1 - LR * mu) for k, v in formulations().items()},
        "gradient_descent, lr 1e-3": (descend(step=LR).history.x, 1 - LR * mu),
        "gradient_descent, 1/L": (descend().history.x, 1 - mu / L),
        "exact line search": (descend(step="exact").history.x, (L - mu) / (L + mu)),
        "Nesterov": (descend(momentum=root, nesterov=True).history.x, 1 - 1 / kappa),
        "heavy ball": (descend(**ball).history.x, root),
    }
    print(f"A: 100 x 20, cond {kappa:.2f}; error = ||x - numpy.linalg.lstsq||\n")
    print(f"{'':28}{'error, 200 steps':>17}{'per step':>10}{'theory':>9}")
    errors = {}
    for name, (path, rate) in paths.items():
        error = errors[name] = torch.linalg.vector_norm(path - exact, dim=-1)
        above = int((error > 1e-12).sum()) - 1  # beyond, rounding
        start = above // 3
        seen = float(error[above] / error[start]) ** (1 / (above - start))
        print(f"{name:28}{float(error[-1]):17.1e}{seen:10.4f}{rate:9.4f}")
    for name, x in (("lstsq", fl.lstsq(A, y)), ("lsmr", fl.solvers.lsmr(A, y).x)):
        print(f"{name:28}{float((x - exact).norm()):17.1e}")

    figure, axis = plt.subplots(figsize=(8.6, 5), layout="constrained")
    axis.set_prop_cycle(color=["#c0392b", "#e08e0b", "#7d5ba6", "#2a9d8f", "#1d5b9c"])
    for name, error in list(errors.items())[3:]:
        label = name.replace("descent, lr 1e-3", "descent, the three formulations: lr 1e-3")
        plot.convergence(error, axis, rate=paths[name][1], label=label)
    axis.axhline(float((fl.lstsq(A, y) - exact).norm()), color="0.35", lw=1)
    axis.annotate("fl.lstsq(A, y), no steps", (150, 2.4e-16), color="0.35", fontsize=10)
    axis.set(ylabel="distance to numpy.linalg.lstsq", xlim=(0, 204), ylim=(1e-16, 10))
    axis.legend(frameon=False, loc="upper right", labelcolor="linecolor")
    axis.set_title("Least squares by descent (dashed: the textbook rate)", loc="left")
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
