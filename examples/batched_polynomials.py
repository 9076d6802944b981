"""Twelve noisy curves fitted at once: one function, vmap in torch and vmap in JAX, same digits.

    python batched_polynomials.py [-o picture.png]

Each curve has its own sample points, so each has its own Vandermonde matrix; vmap makes them one
batched solve. The derivative of every fit with respect to every sample comes from the same batch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import torch

import funclsq as fl
import funclsq.jax as flj

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
CURVES, SAMPLES, DEGREE = 12, 40, 7


FINE = np.linspace(-1, 1, 200)


def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample points (12, 40) in [-1, 1], noisy values there, and true ones on the fine points."""
    rng = np.random.default_rng(7)
    t = np.sort(rng.uniform(-1, 1, (CURVES, SAMPLES)), axis=1)
    t[:, 0], t[:, -1] = -1, 1
    a, b, c = rng.uniform([[0.5], [1], [-1]], [[1.5], [3.2], [1]], (3, CURVES))[..., None]
    y, truth = (a * np.sin(b * v + c) + 0.4 * np.cos(1.6 * b * v) for v in (t, FINE))
    return t, y + 0.12 * rng.standard_normal(t.shape), truth


def powers(t, library):
    """Columns 1, t, ..., t^7, by the same products in every library."""
    columns = [library.ones_like(t)]
    for _ in range(DEGREE):
        columns.append(columns[-1] * t)
    return library.stack(columns, -1)


def fit_torch(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return fl.lstsq(powers(t, torch), y, solver="qr")


def fit_jax(t: jax.Array, y: jax.Array) -> jax.Array:
    return flj.lstsq(powers(t, jnp), y, solver="qr")


def main() -> None:
    default = Path(__file__).resolve().parents[1] / "docs" / "assets" / "batched_polynomials.png"
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=default)
    arguments = parser.parse_args()

    t, y, truth = data()
    in_torch = [torch.from_numpy(v) for v in (t, y)]
    in_jax = [jnp.asarray(v) for v in (t, y)]
    coefficients = torch.func.vmap(fit_torch)(*in_torch)
    others = np.asarray(jax.jit(jax.vmap(fit_jax))(*in_jax))
    loop = torch.stack([fit_torch(a, b) for a, b in zip(*in_torch)])
    numpy = np.stack([np.linalg.lstsq(powers(a, np), b)[0] for a, b in zip(t, y)])

    # d coefficients / d samples, (12, 8, 40), in both
    by_t = torch.func.vmap(torch.func.jacrev(fit_torch))(*in_torch).numpy()
    by_j = np.asarray(jax.vmap(jax.jacrev(fit_jax))(*in_jax))

    print(f"{CURVES} curves x {SAMPLES} samples, degree {DEGREE}: coefficients of the first curve")
    for name, x in (("torch", coefficients[0].numpy()), ("JAX", others[0]), ("NumPy", numpy[0])):
        print(f"{name:6}" + "".join(f"{v:20.15f}" for v in x[:5]))
    same = np.array_equal(coefficients.numpy(), others)
    print(
        f"\ntorch and JAX, all coefficients: {'identical, bit by bit' if same else 'not identical'}"
    )
    print(f"largest difference, torch - JAX: {np.abs(coefficients.numpy() - others).max():.0e}")
    print(f"vmap - loop over the curves:     {float((coefficients - loop).abs().max()):.0e}")
    print(f"vmap - numpy.linalg.lstsq:       {np.abs(coefficients.numpy() - numpy).max():.0e}")
    print(f"d fit / d sample points:         {np.abs(by_t - by_j).max():.0e} (torch - JAX)")

    figure, axes = plt.subplots(3, 4, figsize=(11, 6.6), sharex=True, sharey=True)
    figure.set_layout_engine("constrained")
    curves = powers(FINE, np)
    for i, axis in enumerate(axes.flat):
        axis.plot(FINE, truth[i], color="0.6", lw=1.2, ls="--", label="truth")
        axis.plot(t[i], y[i], ".", color="#7b8794", ms=4, label="samples")
        fitted = curves @ coefficients[i].numpy()
        axis.plot(FINE, fitted, color="#1d5b9c", lw=3.4, alpha=0.55, label="torch")
        axis.plot(FINE, curves @ others[i], color="#e08e0b", lw=1.2, label="JAX")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4,
                  frameon=False)  # fmt: skip
    figure.suptitle("Twelve polynomial fits in one vmap", x=0.01, ha="left")
    figure.savefig(arguments.output, dpi=120)
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
