"""A robust fit as a differentiable layer, and what each data point does to the answer.

    python robust_irls.py [-o picture.png]

Iteratively reweighted least squares: each point is weighted by how well the last fit explains it
(Geman-McClure, whose scale shrinks to that of the noise). Every step is a fl.lstsq with weights, so
the derivative of the final line in every coordinate of every point comes with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

import funclsq as fl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

torch.set_default_dtype(torch.float64)
torch.manual_seed(1)
NOISE = 0.15


def robust(A: torch.Tensor, b: torch.Tensor, scale: float = 2.5 * NOISE) -> torch.Tensor:
    """min sum_i rho(r_i / scale), rho(t) = t^2 / (1 + t^2), from a wide scale to the given one."""
    x = fl.lstsq(A, b)
    for k in range(40):
        wide = max(scale, 6.0 * 0.8**k)
        weights = (1 + ((A @ x - b) / wide) ** 2) ** -2
        x = fl.lstsq(A, b, weights=weights)
    return x


def line_data() -> tuple[torch.Tensor, torch.Tensor]:
    """60 points, 18 of them outliers."""
    t = torch.linspace(0, 4, 60)
    b = 0.5 + 0.8 * t + NOISE * torch.randn(60)
    wrong = torch.randperm(60)[:18]
    b[wrong] = b[wrong] + 1.5 + 3 * torch.rand(18) - 0.9 * t[wrong]
    return t, b


def plane_data() -> tuple[torch.Tensor, torch.Tensor]:
    """300 samples of z = 1 + 0.5 x - 0.3 y; those of one corner stand on a step."""
    xy = torch.rand(300, 2) * 4
    z = 1 + 0.5 * xy[:, 0] - 0.3 * xy[:, 1] + NOISE * torch.randn(300)
    return xy, z + 2.5 * ((xy[:, 0] > 2.4) & (xy[:, 1] > 2.0))


def design(points: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.ones_like(points[:, :1]), points], 1)


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "docs" / "assets" / "robust_irls.png"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=default)
    arguments = parser.parse_args()

    t, b = line_data()
    A = design(t[:, None])
    fits, pulls = {}, {}
    for name, fit in (("least squares", fl.lstsq), ("robust", robust)):
        fits[name] = fit(A, b)
        pulls[name] = torch.func.jacrev(lambda b, fit=fit: fit(A, b)[1])(b)
    forward = torch.func.jacfwd(lambda b: robust(A, b)[1])(b)
    h = 1e-6 * torch.randn(60)
    along = (robust(A, b + h)[1] - robust(A, b - h)[1]) / 2
    print("line, 60 points, 18 outliers; truth 0.5 + 0.8 t")
    print(f"{'':16}{'intercept':>11}{'slope':>9}{'strongest pull of an outlier':>30}")
    far = (b - 0.5 - 0.8 * t).abs() > 5 * NOISE
    for name, x in fits.items():
        strongest = float(pulls[name][far].abs().max())
        print(f"{name:16}{float(x[0]):11.4f}{float(x[1]):9.4f}{strongest:30.2e}")
    print(f"reverse less forward mode: {float((pulls['robust'] - forward).abs().max()):.0e}")
    print(f"against central differences: {float((forward @ h - along) / along):.0e} (relative)\n")

    xy, z = plane_data()
    P = design(xy)
    plane, flat = robust(P, z), fl.lstsq(P, z)
    print("plane, 300 points, one corner raised by 2.5; truth 1 + 0.5 x - 0.3 y")
    for name, x in (("least squares", flat), ("robust", plane)):
        print(f"{name:16}" + "".join(f"{v:9.4f}" for v in x.tolist()))

    figure, axes = plt.subplots(1, 3, figsize=(12.4, 4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    limit = float(max(p.abs().max() for p in pulls.values()))
    for axis, (name, x) in zip(axes, fits.items()):
        dots = axis.scatter(
            t, b, c=pulls[name], cmap="RdBu_r", vmin=-limit, vmax=limit, s=34, edgecolors="0.3",
            linewidths=0.6, zorder=3,
        )  # fmt: skip
        axis.plot(t, 0.5 + 0.8 * t, "--", color="0.5", lw=1.2, label="truth")
        axis.plot(t, A @ x, color="#1d2a3a", lw=2, label=name)
        axis.set(title=f"{name}: slope {float(x[1]):.3f}", xlabel="t")
        axis.legend(frameon=False, loc="lower right")
    figure.colorbar(dots, ax=axes[:2], label="d slope / d point", shrink=0.9, pad=0.02)
    with torch.no_grad():
        found = (1 + ((P @ plane - z) / (2.5 * NOISE)) ** 2) ** -2
    last = axes[2].scatter(*xy.T, c=found, cmap="viridis", s=26, vmin=0, vmax=1)
    axes[2].set(title="robust plane: weight of each sample", xlabel="x", ylabel="y", aspect="equal")
    figure.colorbar(last, ax=axes[2], shrink=0.9, pad=0.02)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
