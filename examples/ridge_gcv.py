"""How much to damp? The data themselves tell, by generalised cross-validation and its derivatives.

    python ridge_gcv.py [-o picture.png]

An ill-posed problem: a light source seen through a slit (the Shaw problem, 64 unknowns, noise
0.5%). Undamped, noise is all there is. GCV(damp) = m ||A x - b||^2 / trace(I - H)^2, with
H = A (A^T A + damp^2)^-1 A^T, estimates the error of predicting data that were left out. Newton's
method minimises it over log(damp); value, slope and curvature all come through fl.lstsq.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch

import funclsq as fl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

N = 64
torch.set_default_dtype(torch.float64)
torch.manual_seed(3)


def shaw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Angles, matrix and source."""
    t = (torch.arange(N) + 0.5) * math.pi / N - math.pi / 2
    u = torch.sin(t)[:, None] + torch.sin(t)[None, :]
    A = (t.cos()[:, None] + t.cos()[None, :]) ** 2 * torch.sinc(u) ** 2 * math.pi / N
    x = 2 * torch.exp(-6 * (t - 0.8) ** 2) + torch.exp(-2 * (t + 0.5) ** 2)
    return t, A, x


t, A, truth = shaw()
clean = A @ truth
b = clean + 0.005 * clean.norm() / math.sqrt(N) * torch.randn(N)


def fit(log_damp: torch.Tensor, right: torch.Tensor = b) -> torch.Tensor:
    return fl.lstsq(A, right, damp=log_damp.exp())


def gcv(log_damp: torch.Tensor) -> torch.Tensor:
    hat = A @ fit(log_damp, torch.eye(N))
    return N * ((A @ fit(log_damp) - b) ** 2).sum() / (N - hat.trace()) ** 2


def log_gcv(log_damp: torch.Tensor) -> torch.Tensor:
    return gcv(log_damp).log()


def learn(start: float) -> list[torch.Tensor]:
    """Newton's method, steps of at most a factor 3 and always downhill."""
    path = [torch.tensor(start)]
    for _ in range(40):
        slope = torch.func.grad(log_gcv)(path[-1])
        curvature = torch.func.grad(torch.func.grad(log_gcv))(path[-1])
        step = -slope / curvature if curvature > 0 else -torch.sign(slope) * 9
        path.append(path[-1] + step.clamp(-math.log(3), math.log(3)))
        if abs(slope) < 1e-10:
            break
    return path


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "docs" / "assets" / "ridge_gcv.png"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=default)
    arguments = parser.parse_args()

    path = learn(math.log(1.0))
    learnt = path[-1]
    grid = torch.linspace(math.log(1e-6), math.log(2), 161)
    curve = torch.func.vmap(gcv)(grid)
    errors = torch.func.vmap(lambda d: (fit(d) - truth).norm() / truth.norm())(grid)
    best = grid[errors.argmin()]
    h = 1e-4
    slope = float(torch.func.grad(log_gcv)(path[1]))
    difference = float((log_gcv(path[1] + h) - log_gcv(path[1] - h)) / (2 * h))
    print(f"d log GCV / d log damp: {slope:.9f}; by central differences {difference:.9f}")
    flat = float(torch.func.grad(log_gcv)(learnt))
    print(f"Newton: {len(path) - 1} steps, final slope {flat:.0e}\n")
    print(f"{'':22}{'damp':>12}{'GCV':>14}{'||A x - b||':>13}{'error of x':>12}")
    choices = {"too little": math.log(1e-5), "learnt by GCV": learnt, "too much": math.log(0.5)}
    for name, d in {**choices, "best (needs the truth)": best}.items():
        d = torch.as_tensor(d)
        r, e = (A @ fit(d) - b).norm(), (fit(d) - truth).norm() / truth.norm()
        print(
            f"{name:22}{float(d.exp()):12.3e}{float(gcv(d)):14.6e}{float(r):13.5f}{float(e):12.4f}"
        )

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    damp = grid.exp()
    left.loglog(damp, curve, color="#1d5b9c", lw=2.2, label="GCV")
    left.loglog(damp, errors**2, color="0.6", lw=1.6, label="error of x, squared")
    dots = torch.stack(path)
    left.loglog(dots.exp(), torch.func.vmap(gcv)(dots), "o-", color="#c0392b", ms=5, lw=0.8,
                label="Newton on GCV")  # fmt: skip
    left.set(xlabel="damp", title="What the data tell", ylim=(1e-5, 30))
    left.legend(frameon=False)
    for name, d, colour, width in (
        ("truth", None, "0.25", 1.2),
        ("too little: 1e-5", math.log(1e-5), "#e08e0b", 1.2),
        (f"learnt: {float(learnt.exp()):.1e}", learnt, "#c0392b", 2.2),
        ("too much: 0.5", math.log(0.5), "#2a9d8f", 1.6),
    ):
        x = truth if d is None else fit(torch.as_tensor(d))
        middle.plot(t, x, color=colour, lw=width, ls="--" if d is None else "-", label=name)
    middle.set(xlabel="angle", title="The source", ylim=(-1.2, 4.4))
    middle.legend(frameon=False, loc="upper left")
    paths = torch.func.vmap(fit)(grid)
    for i in range(0, N, 2):
        right.semilogx(damp, paths[:, i], color=plt.cm.viridis(i / N), lw=1)
    right.axvline(float(learnt.exp()), color="#c0392b", lw=1.6)
    right.annotate("learnt", (float(learnt.exp()) * 1.2, 3.2), color="#c0392b")
    right.set(xlabel="damp", ylim=(-1.2, 3.6), title="Ridge path: every second unknown")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
