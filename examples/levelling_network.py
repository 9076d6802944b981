"""Heights of a levelling network, how well they are known, and which measurement is wrong.

    python levelling_network.py [-o picture.png]

49 benchmarks, 87 levelled height differences, 1 mm per root km. Differences leave the height of the
whole network open: A has rank n - 1. Either one benchmark is held, or the network stays free and
lstsq returns the heights nearest to approximate ones, x0. One line is 12 mm wrong: the w-test, each
residual over its own standard deviation, finds it. All comes from J = d heights / d measurements.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection

import funclsq as fl

torch.set_default_dtype(torch.float64)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "levelling_network.png"
SIDE, SIGMA, WRONG, BLUNDER, CRITICAL = 7, 1.0, 31, 12.0, 3.29  # |w| > 3.29 by chance: 0.1%
rng = np.random.default_rng(4)
i = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
place = 4.0 * np.stack([i % SIDE, i // SIDE], -1).reshape(-1, 2)  # km
place += rng.uniform(-1.3, 1.3, place.shape)
start = np.concatenate([i[:, :-1].ravel(), i[:-1].ravel(), i[:-1:2, :-1:2].ravel()])
end = np.concatenate([i[:, 1:].ravel(), i[1:].ravel(), i[1::2, 1::2].ravel()])
kept = rng.random(len(start)) > 0.08
lines = np.stack([start[kept], end[kept]])
m, n = lines.shape[1], len(place)
length = torch.from_numpy(np.linalg.norm(place[lines[1]] - place[lines[0]], axis=1))
weights = 1 / (SIGMA**2 * length)  # 1 / variance, per mm^2
pattern = fl.SparsityPattern(np.tile(np.arange(m), 2), lines.ravel(), (m, n))
A = fl.Sparse(pattern, torch.ones(2, m).mul(torch.tensor([[-1.0], [1.0]])).flatten())
rest = A.to_dense()[:, 1:]
truth = 1000 * torch.from_numpy(300 + 40 * np.sin(place[:, 0] / 5) + 30 * np.cos(place[:, 1] / 7))
b = A @ truth + torch.from_numpy(rng.standard_normal(m)) / weights.sqrt()  # mm
b[WRONG] += BLUNDER
about = truth + 20 * torch.from_numpy(rng.standard_normal(n))


def free(b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of all adjusted heights those nearest to the approximate ones."""
    return fl.lstsq(A, b, weights=weights, x0=about)


def held(b: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """With the true height of benchmark 0."""
    known = A @ truth.index_fill(0, torch.arange(1, n), 0.0)
    return torch.cat([truth[:1], fl.lstsq(rest, b - known, weights=weights)])


def w_test(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Residuals, their redundancies, w, and the variance factor."""
    redundancy = 1 - (A @ torch.func.jacrev(free)(b, weights)).diagonal()
    v, tested = A @ free(b, weights) - b, (weights > 0) & (redundancy > 1e-9)
    w = torch.where(tested, v * (weights / redundancy.clamp_min(1e-9)).sqrt(), 0)
    return v, redundancy, w, float((weights * v**2).sum() / redundancy[tested].sum())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=PICTURE)
    output = parser.parse_args().output

    rank = fl.solve(A, b, weights=weights, x0=about).rank
    v, redundancy, w, factor = w_test(weights)
    print(f"{m} lines, {n} benchmarks, rank {rank}, redundancy {float(redundancy.sum()):.6f}")
    print(f"variance factor {factor:.2f}; w beyond {CRITICAL} is suspect\n")
    print(f"{'line':>6}{'km':>7}{'residual, mm':>14}{'redundancy':>12}{'w':>8}")
    for k in w.abs().argsort(descending=True)[:3].tolist():
        print(f"{k:6}{length[k]:7.2f}{v[k]:14.2f}{redundancy[k]:12.2f}{w[k]:8.2f}")
    guilty = int(w.abs().argmax())
    clean = weights.index_fill(0, torch.tensor(guilty), 0.0)
    after, factor = w_test(clean)[2:]
    print(f"\nwithout line {guilty} (planted: {WRONG}): variance factor {factor:.2f},", end=" ")
    print(f"largest |w| {float(after.abs().max()):.2f}\n")
    errors = {}
    for name, adjust in (("benchmark 0 held", held), ("free network", free)):
        J = torch.func.jacrev(adjust)(b, clean)  # covariance: J diag(variances) J^T
        e = errors[name] = (J**2 @ (1 / weights)).sqrt()
        moved = (adjust(b, clean) - adjust(b, weights)).abs().max()
        print(f"{name:18}standard errors {e.min():.2f} to {e.max():.2f} mm,", end=" ")
        print(f"the blunder moved a height by {moved:.2f} mm")
    other = fl.covariance(fl.factorize(rest, weights=clean), diag=True).sqrt()
    print(f"against fl.covariance: {(errors['benchmark 0 held'][1:] - other).abs().max():.0e}")
    pull = torch.func.grad(lambda b: held(b, clean)[-1])(b)
    h = torch.from_numpy(rng.standard_normal(m))
    difference = (held(b + h, clean) - held(b - h, clean))[-1] / 2
    print(f"far corner along a change of all lines: {pull @ h:.9f}; {difference:.9f} by difference")

    figure, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
    axes = [axes[0, 0], *axes[1], axes[0, 1]]
    for axis, values, cmap, limits, title, label in (
        (axes[0], w.abs(), "YlOrRd", (0, 6), f"w-test: line {guilty} is wrong", "|w|"),
        (axes[3], pull, "RdBu_r", (-1, 1), "what decides the far corner", "d height / d line"),
    ):
        drawn = LineCollection(place[lines.T], array=values, cmap=cmap, clim=limits, lw=3)
        figure.colorbar(axis.add_collection(drawn), ax=axis, label=label)
        axis.set_title(title)
    for axis, (name, e) in zip(axes[1:3], errors.items()):
        axis.add_collection(LineCollection(place[lines.T], color="0.8", lw=1))
        dots = axis.scatter(*place.T, c=e, s=14 + 12 * e**2, vmin=0, vmax=4, zorder=2)
        axis.set_title(f"standard error, {name}")
    figure.colorbar(dots, ax=axes[1:3], label="mm")
    for axis in axes:
        axis.scatter(*place.T, s=6, color="0.2", zorder=3)
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(output, dpi=120)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
