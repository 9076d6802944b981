"""Where are the sensors? Levenberg-Marquardt with a sparse Jacobian, by optimistix and funclsq.

    python jax_levenberg_marquardt.py [-o picture.png]

112 sensors at unknown places measure distances to their neighbours, 0.5% wrong; eight know where
they are. Each distance depends on four unknowns out of 208. optimistix hides that: it asks a
linear solver to solve with products J v alone. Given the pattern, funclsq's solver recovers J from
one product per colour of its columns and factors a sparse matrix; a dense solver makes a product
per column. The products are counted where they happen, by a callback in the derivative rule.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optimistix as optx

import funclsq as fl
import funclsq.jax.lineax as fll
from funclsq.jax.coloring import color_columns

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
SIDE, ANCHORS = (14, 8), 8
rng = np.random.default_rng(4)
grid = np.stack(np.meshgrid(np.arange(SIDE[0]), np.arange(SIDE[1]), indexing="ij"), -1)
truth = grid.reshape(-1, 2) + rng.uniform(-0.3, 0.3, (SIDE[0] * SIDE[1], 2))
known, free = np.split(rng.permutation(len(truth)), [ANCHORS])
apart = np.linalg.norm(truth[:, None] - truth[None], axis=-1)
i, j = np.nonzero(np.triu(apart < 1.9, 1))
measured = apart[i, j] * (1 + 0.005 * rng.standard_normal(len(i)))
start = truth[free] + 0.3 * rng.standard_normal((len(free), 2))
number = np.full(len(truth), -1)
number[free] = np.arange(len(free))
products = []  # one entry per product J v


def misfit(y: jax.Array) -> jax.Array:
    p = jnp.asarray(truth).at[free].set(y.reshape(-1, 2))
    return jnp.sqrt(((p[i] - p[j]) ** 2).sum(-1) + 1e-12) - measured


counted = jax.custom_jvp(misfit)


@counted.defjvp
def _(primals, tangents):
    jax.debug.callback(lambda _: products.append(1), tangents[0][0])
    return jax.jvp(misfit, primals, tangents)


def pattern() -> fl.SparsityPattern:
    """A distance depends on the two coordinates of each free end."""
    edge, end = np.nonzero(number[np.stack([i, j], 1)] >= 0)
    column = 2 * number[np.where(end == 0, i[edge], j[edge])]
    both = np.concatenate([column, column + 1])
    return fl.SparsityPattern(np.tile(edge, 2), both, (len(i), 2 * len(free)))


def run(linear_solver) -> tuple[np.ndarray, int, int, float]:
    """Places, steps, products J v, seconds (without counting, compiled)."""
    method = optx.LevenbergMarquardt(1e-9, 1e-9, linear_solver=linear_solver)

    def solve(f, y):
        found = optx.least_squares(lambda y, _: f(y), method, y, max_steps=300)
        return found.value, found.stats["num_steps"]

    solve = jax.jit(solve, static_argnums=0)
    products.clear()
    for f in (counted, misfit, misfit):
        begun = time.perf_counter()
        y, steps = jax.block_until_ready(solve(f, jnp.asarray(start.reshape(-1))))
        seconds = time.perf_counter() - begun
    jax.effects_barrier()
    return np.asarray(y), int(steps), len(products), seconds


def main() -> None:
    assets = Path(__file__).resolve().parents[1] / "docs" / "assets"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=assets / "jax_levenberg_marquardt.png")
    S = pattern()
    colours = color_columns(S)
    total = colours.max() + 1
    print(f"{len(i)} distances, {S.shape[1]} unknowns, {S.nnz} nonzeros, {total} colours\n")
    print(f"{'linear solver':20}{'steps':>7}{'products':>10}{'a step':>8}{'s':>8}{'rms error':>11}")
    answers = []
    for name, solver in (("dense QR", fll.QR()), ("sparse, by colours", fll.Cholesky(pattern=S))):
        y, steps, made, seconds = run(solver)
        answers.append(y.reshape(-1, 2))
        error = np.sqrt(((answers[-1] - truth[free]) ** 2).sum(-1).mean())
        print(f"{name:20}{steps:7}{made:10}{made / steps:8.1f}{seconds:8.3f}{error:11.5f}")
    print(f"\nlargest difference of the two answers: {np.abs(answers[0] - answers[1]).max():.1e}")

    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), layout="constrained")
    places = truth.copy()
    for axis, title, at in zip(axes, ("start", "found"), (start, answers[1])):
        places[free] = at
        axis.plot(*places[np.stack([i, j])].transpose(2, 0, 1), color="0.75", lw=0.5)
        axis.plot(*np.stack([truth[free], at]).transpose(2, 0, 1), color="#c0392b", lw=0.9)
        axis.plot(*at.T, "o", color="#1d5b9c", ms=2.5)
        axis.plot(*truth[known].T, "s", color="#e08e0b", ms=5)
        axis.set(title=f"{title} (red: to the true place)", aspect="equal")
        axis.set_axis_off()
    axes[2].scatter(S.col, S.row, c=colours[S.col], cmap="turbo", s=1.0)
    axes[2].set(title=f"Jacobian, {total} colours", xlabel="unknown", ylim=(len(i), 0))
    figure.savefig(parser.parse_args().output, dpi=120)


if __name__ == "__main__":
    main()
