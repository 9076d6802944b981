"""Why SGD and the formula disagree: a regression whose minimisers are a plane, not a point.

    python regression_with_intercept.py [-o picture.png]

A tutorial fits y to three columns and an intercept by SGD, then by a formula, and finds two "very
different" answers. With the column of ones the design has rank 2 of 4: the loss is a valley with a
flat floor. SGD stops where its way down from the start meets the floor; the formula picks the point
of the floor that is nearest to 0. Both are lstsq.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

import funclsq as fl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

X = torch.from_numpy(np.linspace((0, 1, 2), (1, 2, 3), 10))
torch.manual_seed(0)
y = X @ torch.tensor([3.0, 6.0, 9.0], dtype=torch.float64) + 3.0
y = y + torch.randn(y.shape)
start = torch.cat([torch.randn(3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)])
A = torch.cat([X, torch.ones(10, 1, dtype=torch.float64)], dim=1)


def loss(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares for x (..., 4)."""
    return ((x @ A.T - y) ** 2).sum(-1)


def train(start: torch.Tensor, steps: int = 10_000) -> torch.Tensor:
    """Steps of SGD as in the tutorial; returns the path."""
    w = start[:3].clone().requires_grad_()
    bias = start[3:].clone().requires_grad_()
    sgd = torch.optim.SGD([w, bias], lr=0.01)
    path = [start.clone()]
    for _ in range(steps):
        sgd.zero_grad()
        ((X @ w + bias - y) ** 2).sum().backward()
        sgd.step()
        path.append(torch.cat([w, bias]).detach())
    return torch.stack(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    default = Path(__file__).resolve().parents[1] / "docs" / "assets"
    parser.add_argument("-o", "--output", default=default / "regression_with_intercept.png")
    arguments = parser.parse_args()

    path = train(start)
    nearest, least = fl.lstsq(A, y, x0=start), fl.lstsq(A, y)
    inverted = torch.linalg.inv(A.T @ A) @ A.T @ y
    sol = fl.solve(A, y)
    print(f"rank {int(sol.rank)} of 4; true weights 3, 6, 9, bias 3\n")
    print(f"{'':34}{'w1':>12}{'w2':>12}{'w3':>12}{'bias':>12}{'loss':>18}")
    for name, x in (
        ("start", start),
        ("SGD, 10,000 steps", path[-1]),
        ("lstsq(A, y, x0=start)", nearest),
        ("lstsq(A, y)", least),
        ("numpy.linalg.lstsq", torch.from_numpy(np.linalg.lstsq(A.numpy(), y.numpy())[0])),
        ("inv(A^T A) A^T y: rounding noise", inverted),
    ):
        print(f"{name:34}" + "".join(f"{v:12.6f}" for v in x.tolist()) + f"{float(loss(x)):18.8f}")
    print(f"\nSGD less lstsq(x0=start): {float((path[-1] - nearest).abs().max()):.0e}")
    fit = fl.linear_regression(X, y)
    print(
        f"linear_regression: rank {int(fit.rank)}, standard errors {fit.standard_errors.tolist()}"
    )
    one = fl.linear_regression(X[:, :1], y)
    slope, error = float(one.coefficients[0]), float(one.standard_errors[0])
    print(f"one column is all the data tell: slope {slope:.2f} +- {error:.2f}, of 3 + 6 + 9 = 18")

    # A cut through the valley. To the right: along its floor. Up: across it, in the weaker of the
    # two directions that change A x (in the other, SGD arrives within a few steps).
    along = (least - nearest) / (least - nearest).norm()
    across = torch.linalg.svd(A).Vh[1]
    across = across * torch.sign(across @ (start - nearest))
    us, vs = torch.linspace(-2.6, 3.4, 300), torch.linspace(-2.4, 2.4, 300)
    grid = nearest + us[None, :, None] * along + vs[:, None, None] * across
    height = (loss(grid) - loss(nearest)).clamp_min(1e-9)

    figure, axis = plt.subplots(figsize=(8.6, 4.8), layout="constrained")
    levels = np.linspace(0, 6, 25)
    filled = axis.contourf(us, vs, height, levels=levels, cmap="YlGnBu", alpha=0.85)
    axis.axhline(0, color="#1b4965", lw=2)
    axis.text(-2.5, 0.07, "floor: loss 11.3479", color="#1b4965")
    for ou, ov in ((-2.1, -1.4), (-1.2, 1.7), (-0.7, -1.9), (0.8, 1.3), (1.8, -1.2), (2.7, 1.6)):
        other = train(nearest + ou * along + ov * across + torch.linalg.svd(A).Vh[0], 4000)
        side, up = ((other[[0, -1]] - nearest) @ d for d in (along, across))
        axis.plot(side, up, color="0.35", lw=1.2, marker="o", ms=5, mfc="white")
    u, v = ((path - nearest) @ d for d in (along, across))
    axis.plot(u, v, color="#c0392b", lw=2.5)
    end = float(along @ (least - nearest))
    for px, py, text, colour, place in (
        (0, float(v[0]), "start", "#c0392b", (9, -4)),
        (0, 0, "SGD ends here:\nlstsq(A, y, x0=start)", "#c0392b", (9, -32)),
        (end, 0, "lstsq(A, y):\nsmallest norm", "#e08e0b", (9, 9)),
    ):
        axis.plot(px, py, "o", color=colour, ms=9, mec="white", zorder=4)
        axis.annotate(text, (px, py), xytext=place, textcoords="offset points", weight="bold")
    figure.colorbar(filled, ax=axis, ticks=range(7), label="loss above its minimum")
    axis.set(xlabel="along the floor", ylabel="across it", ylim=(-2.4, 2.4), xlim=(-2.6, 3.4))
    axis.set_title("A loss of rank 2: where descent ends depends on where it starts", loc="left")
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
