"""A surface from scattered noisy heights, as one sparse least-squares problem.

The unknowns x are the heights at every point of a grid. The rows of A are of two sorts:

    sample      x at the sample's grid point      against the height measured there     weight 1
    smoothness  a difference of neighbouring x    against 0                             weight w

with one weight w per kind of difference (slope and curvature, per direction) and terrain class.
A never changes; the weights are what is learnt.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from funclsq import SparsityPattern
from funclsq.demo.elevation import Elevation

__all__ = ["CURVATURE", "KINDS", "Samples", "Terrain", "classes", "draw"]

# kind -> offsets (row, column) and coefficients of a finite difference
KINDS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "x": (((0, 0), (0, 1)), (-1, 1)),
    "y": (((0, 0), (1, 0)), (-1, 1)),
    "xx": (((0, 0), (0, 1), (0, 2)), (1, -2, 1)),
    "yy": (((0, 0), (1, 0), (2, 0)), (1, -2, 1)),
    "xy": (((0, 0), (0, 1), (1, 0), (1, 1)), (1, -1, -1, 1)),
}
# The bending energy of a thin plate, xx^2 + yy^2 + 2 xy^2: what one weight multiplies.
CURVATURE = {"x": 0.0, "y": 0.0, "xx": 1.0, "yy": 1.0, "xy": 2.0}


@dataclasses.dataclass(frozen=True)
class Samples:
    """Grid points (flat indices) and the heights measured there, in metres."""

    points: np.ndarray
    heights: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def error(self, surface: Tensor) -> Tensor:
        """Surface minus measured heights."""
        return surface[torch.from_numpy(self.points)] - torch.from_numpy(self.heights)


def draw(
    elevation: Elevation, share: float, noise: float, seed: int
) -> tuple[Samples, Samples, Samples]:
    """Measure ``share`` of all heights with ``noise`` (metres), split into fit, validation, test.

    60, 20 and 20 per cent of the samples, at random.
    """
    rng = np.random.default_rng(seed)
    truth = elevation.heights.ravel()
    count = round(share * truth.size)
    points = rng.choice(truth.size, size=count, replace=False)
    heights = truth[points] + noise * rng.standard_normal(count)
    cuts = [round(0.6 * count), round(0.8 * count)]
    fit, validation, test = map(Samples, np.split(points, cuts), np.split(heights, cuts))
    return fit, validation, test


def classes(surface: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Class every grid point by the steepness around it: 0 (the flattest), 1, ...

    Parameters
    ----------
    surface : array, shape (rows, columns)
        A reconstruction; never the truth.
    levels : tuple of float
        The shares of the area that lie below each class boundary.
    """
    dy, dx = np.gradient(ndimage.gaussian_filter(surface, 2.0))
    steepness = ndimage.gaussian_filter(np.hypot(dx, dy), 6.0)
    return np.digitize(steepness, np.quantile(steepness, levels))


@dataclasses.dataclass(frozen=True)
class Terrain:
    """The matrix and right-hand side, and which weight each row takes.

    ``kind`` and ``centre`` hold, per smoothness row, the number of its difference in ``KINDS``
    and the grid point it is about; sample rows come first and have none.
    """

    shape: tuple[int, int]
    pattern: SparsityPattern
    values: Tensor
    b: Tensor
    kind: np.ndarray
    centre: np.ndarray

    @property
    def samples(self) -> int:
        """Number of sample rows."""
        return len(self.b) - len(self.kind)

    @classmethod
    def assemble(cls, shape: tuple[int, int], fit: Samples) -> Terrain:
        """Lay the rows out: the samples', then each kind of difference at every place it fits."""
        grid = np.arange(shape[0] * shape[1]).reshape(shape)
        columns, values = [fit.points[:, None]], [np.ones((len(fit), 1))]
        kind, centre = [], []
        for number, (offsets, coefficients) in enumerate(KINDS.values()):
            down, right = np.max(offsets, axis=0)
            places = [
                grid[i : shape[0] - down + i, j : shape[1] - right + j].ravel() for i, j in offsets
            ]
            columns.append(np.stack(places, axis=1))
            values.append(np.broadcast_to(np.array(coefficients, float), columns[-1].shape))
            kind.append(np.full(len(places[0]), number))
            centre.append(places[len(places) // 2])
        widths = np.concatenate([np.full(len(c), c.shape[1]) for c in columns])
        pattern = SparsityPattern.from_csr(
            np.concatenate([[0], np.cumsum(widths)]),
            np.concatenate([c.ravel() for c in columns]),
            (len(widths), grid.size),
        )
        b = np.zeros(len(widths))
        b[: len(fit)] = fit.heights
        return cls(
            shape,
            pattern,
            torch.from_numpy(np.concatenate([v.ravel() for v in values])),
            torch.from_numpy(b),
            np.concatenate(kind),
            np.concatenate(centre),
        )

    def rows(self, classes: np.ndarray) -> np.ndarray:
        """Number, in a flattened table (kind, class), of the weight of every smoothness row."""
        return self.kind * (int(classes.max()) + 1) + classes.ravel()[self.centre]
