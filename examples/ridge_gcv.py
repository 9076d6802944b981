"""How much to damp? The data themselves tell, by generalised cross-validation and its derivatives.

    python ridge_gcv.py [-o picture.png]

A spectrum of three lines seen through a blurring instrument: 80 noisy readings, 64 unknowns.
GCV(damp) = m ||A x - b||^2 / trace(I - H)^2, with H = A (A^T A + damp^2)^-1 A^T, estimates the
error of predicting readings that were left out. Newton's method minimises it over log(damp);
value, slope and curvature all come through fl.lstsq.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt

import funclsq as fl
from funclsq import plot
from funclsq.ridge import ridge_path

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "ridge_gcv.png"
M, N, WIDTH, NOISE = 80, 64, 0.02, 0.02
t, s = torch.linspace(0, 1, N), torch.linspace(0, 1, M)
A = torch.exp(-(((s[:, None] - t) / WIDTH) ** 2) / 2) / (WIDTH * N * math.sqrt(2 * math.pi))
truth = sum(
    h * torch.exp(-(((t - c) / w) ** 2) / 2)
    for h, c, w in ((1, 0.25, 0.03), (0.7, 0.4, 0.03), (0.5, 0.72, 0.08))
)
b = A @ truth + NOISE * torch.randn(M)


def fit(log_damp: torch.Tensor, right: torch.Tensor = b) -> torch.Tensor:
    return fl.lstsq(A, right, damp=log_damp.exp())


def gcv(log_damp: torch.Tensor) -> torch.Tensor:
    used = (A @ fit(log_damp, torch.eye(M))).trace()  # effective number of unknowns
    return M * ((A @ fit(log_damp) - b) ** 2).sum() / (M - used) ** 2


def log_gcv(log_damp: torch.Tensor) -> torch.Tensor:
    return gcv(log_damp).log()


def learn(start: float) -> torch.Tensor:
    """Newton's method, steps of at most a factor 3 and always downhill."""
    path = [torch.tensor(start)]
    for _ in range(40):
        slope = torch.func.grad(log_gcv)(path[-1])
        if abs(slope) < 1e-10:
            break
        curvature = torch.func.grad(torch.func.grad(log_gcv))(path[-1])
        step = -slope / curvature if curvature > 0 else -torch.sign(slope) * 9
        path.append(path[-1] + step.clamp(-math.log(3), math.log(3)))
    return torch.stack(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=PICTURE)
    output = parser.parse_args().output

    path = learn(math.log(3.0))
    h, at = 1e-4, path[2]
    difference = float(log_gcv(at + h) - log_gcv(at - h)) / (2 * h)
    slope = float(torch.func.grad(log_gcv)(at))
    print(f"d log GCV / d log damp: {slope:.9f}; by central differences {difference:.9f}")
    flat = float(torch.func.grad(log_gcv)(path[-1]))
    print(f"Newton: {len(path) - 1} steps, final slope {flat:.0e}\n")

    grid = torch.linspace(math.log(1e-4), math.log(4), 161)
    ridge = ridge_path(A, b, grid.exp())
    curve = torch.func.vmap(gcv)(grid)
    errors = (ridge.x - truth).norm(dim=1) / truth.norm()
    choices = {
        "too little": torch.tensor(math.log(0.01)),
        "learnt by GCV": path[-1],
        "least GCV of the grid": grid[curve.argmin()],
        "corner of the L-curve": grid[ridge.corner],
        "too much": torch.tensor(math.log(2.0)),
        "best (needs the truth)": grid[errors.argmin()],
    }
    print(f"{'':24}{'damp':>11}{'GCV':>14}{'||A x - b||':>13}{'error of x':>12}")
    for name, d in choices.items():
        r, e = float((A @ fit(d) - b).norm()), float((fit(d) - truth).norm() / truth.norm())
        print(f"{name:24}{float(d.exp()):11.3e}{float(gcv(d)):14.6e}{r:13.5f}{e:12.4f}")

    learnt = float(path[-1].exp())
    figure, panels = plt.subplots(2, 2, figsize=(9.6, 7), layout="constrained")
    axes = panels.flat
    axes[0].loglog(ridge.damp, curve, color="#1d5b9c", lw=2.2, label="GCV on a grid")
    axes[0].loglog(path.exp(), torch.func.vmap(gcv)(path), "o-", color="#c0392b", ms=5, lw=0.8,
                   label="Newton on GCV")  # fmt: skip
    axes[0].set(xlabel="damp", title="GCV: what the data tell")
    axes[0].legend(frameon=False)
    for name, colour, width in (("too little", "#e08e0b", 1), ("too much", "#2a9d8f", 1.6),
                                ("learnt by GCV", "#c0392b", 2.2)):  # fmt: skip
        axes[1].plot(t, fit(choices[name]), color=colour, lw=width, label=name)
    axes[1].plot(t, truth, "--", color="0.25", lw=1.2, label="truth")
    axes[1].set(xlabel="wavelength", title="the spectrum", ylim=(-0.6, 1.6))
    axes[1].legend(frameon=False, ncols=2)
    axes[2].semilogx(ridge.damp, ridge.x[:, ::2], color="#1d5b9c", lw=0.8, alpha=0.6)
    axes[2].axvline(learnt, color="#c0392b", lw=1.6)
    axes[2].annotate("learnt ", (learnt, 1.3), color="#c0392b", ha="right")
    axes[2].set(xlabel="damp", ylim=(-0.6, 1.5), title="ridge path, every second unknown")
    plot.l_curve(ridge, axes[3]).set_title("L-curve, for comparison")
    for axis in axes[:3]:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=120)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
