"""A scanner that does not know its own geometry, calibrated through the reconstruction.

    python ct_geometry.py [-o picture.png]

Parallel-beam tomography of a real MR slice: 64 x 64 pixels, 60 views of 90 rays, 1% noise. The
detector is 1.3 pixels off centre, the angles are off by 1.5 degrees. A ray is a row of a sparse
matrix whose weights depend smoothly on both, and so does the image that lstsq rebuilds: its error
leads back to the geometry. Without a known image, rays held out tell the shift, hardly the angle.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import cbook
from matplotlib import pyplot as plt
from scipy.optimize import minimize

import funclsq as fl

torch.set_default_dtype(torch.float64)
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "assets" / "ct_geometry.png"
SIDE, VIEWS, RAYS, SMOOTH = 64, 60, 90, 2.0
TRUE, SHIFT = torch.tensor([[1.3, 1.5], [1.0, 0.0]])  # detector in pixels, angles in degrees
rng = np.random.default_rng(0)
everything = torch.ones(VIEWS * RAYS)
held_out = torch.from_numpy(rng.permutation(VIEWS * RAYS) % 4 == 0)


def matrix(geometry: torch.Tensor) -> fl.Sparse:
    """Weights of the rays x cos + y sin = t, linear between pixels, over first differences."""
    angle = torch.deg2rad(torch.arange(VIEWS) * 180 / VIEWS + geometry[1])
    c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
    t = torch.arange(RAYS)[:, None] - (RAYS - 1) / 2 + geometry[0]
    i = torch.arange(SIDE) + torch.zeros(VIEWS, RAYS, SIDE)  # along the axis that a ray follows
    steep = c.abs() > s.abs()
    main, other = torch.where(steep, c, s), torch.where(steep, s, c)
    cross = (t - (i - (SIDE - 1) / 2) * other) / main + (SIDE - 1) / 2  # where it is on the other
    low = cross.detach().floor()
    near, share = torch.stack([low, low + 1]), torch.stack([1 - cross + low, cross - low])
    inside = ((near >= 0) & (near < SIDE)).flatten().nonzero().squeeze(1)
    pixel = torch.where(steep, i * SIDE + near, near * SIDE + i).flatten()[inside].long()
    ray, value = inside // SIDE % (VIEWS * RAYS), (share / main.abs()).flatten()[inside]
    k = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)  # differences of each and its neighbours
    left, right = k.flatten().repeat(2), torch.cat([k.roll(1, d).flatten() for d in (0, 1)])
    edges, step = torch.arange(len(left)) + VIEWS * RAYS, SMOOTH * torch.ones(len(left))
    row, col = torch.cat([ray, edges, edges]), torch.cat([pixel, left, right])
    pattern = fl.SparsityPattern(row, col, (int(edges[-1]) + 1, k.numel()))
    return fl.Sparse(pattern, torch.cat([value, -step, step]))


with cbook.get_sample_data("s1045.ima.gz") as file:
    image = np.frombuffer(file.read(), np.uint16).reshape(SIDE, 4, SIDE, 4).mean((1, 3))
truth = torch.from_numpy(image / image.max()).flatten()
clean = (matrix(TRUE) @ truth)[: VIEWS * RAYS]
noisy = clean + 0.01 * clean.max() * torch.from_numpy(rng.standard_normal(len(clean)))


def rebuild(geometry: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The image and its rays, from the rays of weight 1."""
    A = matrix(geometry)
    edges = torch.ones(A.shape[0] - len(noisy))
    b, weights = torch.cat([noisy, 0 * edges]), torch.cat([seen, edges])
    x = fl.lstsq(A, b, weights=weights, damp=1e-3, solver="cgls", atol=1e-10, btol=1e-10)
    return x, (A @ x)[: len(noisy)]


def image_error(geometry: torch.Tensor) -> torch.Tensor:
    return (rebuild(geometry, everything)[0] - truth).norm() / truth.norm()


def ray_error(geometry: torch.Tensor) -> torch.Tensor:
    found = rebuild(geometry, everything - held_out.to(everything))[1]
    return (found - noisy)[held_out].norm() / noisy[held_out].norm()


def slope(error, geometry) -> tuple[float, np.ndarray]:
    value = error(geometry := torch.tensor(geometry).requires_grad_())
    return value.item(), torch.autograd.grad(value, geometry)[0].numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-o", "--output", default=PICTURE)
    output = parser.parse_args().output
    at, h = torch.tensor([0.2, 0.3]), 1e-6 * torch.eye(2)
    for error in (image_error, ray_error):
        print(f"gradient of {error.__name__:12}{slope(error, at.numpy())[1]}, differences", end=" ")
        print(np.array([float(error(at + d) - error(at - d)) / 2e-6 for d in h]))
    path, bfgs = [np.zeros(2)], {"jac": True, "method": "BFGS", "options": {"gtol": 1e-3}}
    both = minimize(lambda g: slope(image_error, g), path[0], callback=path.append, **bfgs).x
    shift = minimize(lambda g: slope(lambda g: ray_error(g * SHIFT), g), path[0], **bfgs).x
    cases = {"geometry as assumed": path[0], "by the rays": shift, "by the image": both}
    print(f"\n{'':20}{'shift':>8}{'angle':>8}{'ray error':>12}{'image error':>14}")
    figure, axes = plt.subplots(2, 2, figsize=(9, 7.8), layout="constrained")
    for axis, (name, g) in zip(axes.flat, [*cases.items(), ("truth", TRUE)]):
        g = torch.as_tensor(g)
        errors = float(ray_error(g)), float(image_error(g))
        print("{:20}{:8.3f}{:8.3f}{:12.4f}{:14.4f}".format(name, *g.tolist(), *errors))
        if name in cases:
            x = rebuild(g, everything)[0].reshape(SIDE, SIDE)
            axis.imshow(x, cmap="gray", vmin=0, vmax=0.8)
            axis.set(title=f"{name}: error {100 * errors[1]:.0f}%", xticks=[], yticks=[])
    u, v = torch.linspace(-0.3, 2, 7), torch.linspace(-0.5, 2.6, 6)
    level = [[float(image_error(torch.stack([a, b]))) for a in u] for b in v]
    figure.colorbar(axes[1, 1].contourf(u, v, level, levels=15, cmap="YlGnBu"), label="image error")
    axes[1, 1].plot(*np.array(path).T, "o-r", *TRUE, "*k", ms=6, lw=1.2)
    axes[1, 1].set(
        xlabel="shift, pixels", ylabel="angle, degrees", title="down to the truth (star)"
    )
    figure.savefig(output, dpi=120)
    print(f"\nwrote {output}")


if __name__ == "__main__":
    main()
