"""Learn what a solver inverts: a sparse operator, recovered from data by gradient descent.

    python jax_trainable_operator.py [-o picture.png]

An instrument blurs: reading i is a weighted sum of a few neighbouring values of a signal, with
weights that change along the instrument. Where the nonzeros are is known, how large they are is
not. Two equinox modules learn them with optax: SparseLinear from signals and their readings;
LeastSquares, whose output is argmin ||A x - b||, from noisy readings and the signals that the
maker's own software, a least-squares fit with the true operator, reports for them. No reading
that A itself would make is ever shown to the second: every gradient passes through a solve.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import funclsq as fl
import funclsq.jax as flj

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
M, N, WIDTH, PAIRS, STEPS = 90, 60, 7, 64, 500
rng = np.random.default_rng(1)


def instrument(narrow: float, wide: float) -> tuple[fl.SparsityPattern, np.ndarray]:
    """Pattern and weights: bells whose width grows along the instrument."""
    at = np.arange(M) * (N - 1) / (M - 1)
    row = np.repeat(np.arange(M), WIDTH)
    col = (np.round(at).astype(int)[:, None] + np.arange(WIDTH) - WIDTH // 2).reshape(-1)
    inside = (col >= 0) & (col < N)
    row, col = row[inside], col[inside]
    spread = narrow + (wide - narrow) * at[row] / N
    weights = np.exp(-(((col - at[row]) / spread) ** 2)) / spread
    return fl.SparsityPattern(row, col, (M, N)), weights


S, true = instrument(0.5, 1.1)
A = flj.Sparse(S, jnp.asarray(true))
signals = jnp.asarray(np.cumsum(rng.standard_normal((N, PAIRS)), 0) / 4)
readings = A @ signals
noisy = readings + 0.2 * jnp.asarray(rng.standard_normal(readings.shape))
reported = flj.lstsq(A, noisy)
guess = jnp.asarray(instrument(0.7, 0.7)[1])


def train(layer, inputs, targets):
    """Adam on the mean square error; the layer, and loss and error of A at each step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, STEPS))
    params, static = eqx.partition(layer, eqx.is_array)

    def loss(params):
        return ((eqx.combine(params, static)(inputs) - targets) ** 2).mean()

    def step(carry, _):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(slope, state)
        wrong = jnp.linalg.norm(params.A.values - true) / np.linalg.norm(true)
        return (optax.apply_updates(params, updates), state), (value, wrong)

    run = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=STEPS))
    (params, _), history = run(params)
    return eqx.combine(params, static), history


def main() -> None:
    assets = Path(__file__).resolve().parents[1] / "docs" / "assets"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=assets / "jax_trainable_operator.png")
    output = parser.parse_args().output
    forward = flj.SparseLinear(S, use_bias=False, dtype=float, key=jax.random.key(0))
    forward = eqx.tree_at(lambda layer: layer.A.values, forward, guess)
    inverse = flj.LeastSquares(S, guess, rank="full")
    print(f"{M} x {N}, {S.nnz} unknown weights, {PAIRS} pairs, {STEPS} steps of Adam\n")
    print(f"{'module':14}{'learns from':28}{'loss':>18}{'error of A':>19}{'s':>7}")
    found = {}
    for layer, what, inputs, targets in (
        (forward, "signals and readings", signals, readings),
        (inverse, "noisy readings and fits", noisy, reported),
    ):
        begun = time.perf_counter()
        layer, (loss, wrong) = jax.block_until_ready(train(layer, inputs, targets))
        name = type(layer).__name__
        found[name] = layer.A, loss, wrong
        print(f"{name:14}{what:28}{loss[0]:9.1e}{loss[-1]:9.1e}{wrong[0]:10.1%}{wrong[-1]:9.2%}"
              f"{time.perf_counter() - begun:7.1f}")  # fmt: skip

    shape = {"layout": "constrained", "width_ratios": (1, 1, 1, 2)}
    figure, axes = plt.subplots(1, 4, figsize=(12, 4.2), **shape)
    offset = S.col - np.round(S.row * (N - 1) / (M - 1)).astype(int) + WIDTH // 2
    titles = ("true", "first guess", "learnt by\nLeastSquares")
    for axis, title, values in zip(axes, titles, (true, guess, found["LeastSquares"][0].values)):
        band = np.full((M, WIDTH), np.nan)
        band[S.row, offset] = values
        axis.imshow(band, cmap="magma", vmin=0, vmax=true.max(), aspect="auto")
        axis.set(title=title, xlabel="neighbour", ylabel="reading", xticks=[])
        axis.label_outer()
    for name, (_, loss, wrong) in found.items():
        axes[3].semilogy(loss, lw=1, ls=":", label=f"{name}: loss")
        axes[3].semilogy(wrong, lw=2, color=axes[3].lines[-1].get_color(), label="error of A")
    axes[3].set(title="Training", xlabel="step")
    axes[3].legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
