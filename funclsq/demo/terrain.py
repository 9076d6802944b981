"""A surface from scattered noisy heights, as one sparse least-squares problem.

The unknowns x are the heights at every point of a grid. The rows of A are of two sorts:

    sample      x at a sample's grid point        against the height measured there
    smoothness  a difference of neighbouring x    against 0

A never changes. What is learnt is the weights: one for each survey, and one for each kind of
difference (slope and curvature, per direction) in each class of terrain.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from funclsq import Sparse, SparsityPattern, lstsq
from funclsq.demo.samples import SURVEYS, Samples

__all__ = ["KINDS", "THIN_PLATE", "LogWeights", "Terrain", "classes"]

# kind of difference -> offsets (row, column), coefficients
KINDS: dict[str, tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = {
    "x": (((0, 0), (0, 1)), (-1, 1)),
    "y": (((0, 0), (1, 0)), (-1, 1)),
    "xx": (((0, 0), (0, 1), (0, 2)), (1, -2, 1)),
    "yy": (((0, 0), (1, 0), (2, 0)), (1, -2, 1)),
    "xy": (((0, 0), (0, 1), (1, 0), (1, 1)), (1, -1, -1, 1)),
}
# The bending energy of a thin plate, xx^2 + yy^2 + 2 xy^2, in the order of KINDS.
THIN_PLATE = (0.0, 0.0, 1.0, 1.0, 2.0)


class LogWeights(NamedTuple):
    """Logarithms of the weights: of the surveys, and of smoothness by kind and class.

    A constant added to all of them changes nothing, so descent never moves that way.
    """

    surveys: Tensor
    smoothness: Tensor

    def relative(self) -> LogWeights:
        """Shift so that the first survey has weight 1."""
        return LogWeights(*(t - self.surveys[0] for t in self))


@dataclasses.dataclass(frozen=True)
class Terrain:
    """A, b, and what decides each row's weight.

    ``survey`` is the survey of every sample row (they come first); ``kind`` and ``centre`` are
    the number of the difference in ``KINDS`` and the grid point of every smoothness row.
    """

    shape: tuple[int, int]
    pattern: SparsityPattern
    values: Tensor
    b: Tensor
    survey: np.ndarray
    kind: np.ndarray
    centre: np.ndarray

    @classmethod
    def assemble(cls, shape: tuple[int, int], fit: Samples) -> Terrain:
        """Lay the rows out: the samples', then each kind of difference wherever it fits."""
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
        return cls(
            shape,
            pattern,
            torch.from_numpy(np.concatenate([v.ravel() for v in values])),
            torch.from_numpy(np.concatenate([fit.heights, np.zeros(len(widths) - len(fit))])),
            fit.survey,
            np.concatenate(kind),
            np.concatenate(centre),
        )

    def groups(self, classes: np.ndarray, count: int | None = None) -> np.ndarray:
        """Number every row's weight among all: the surveys', then kinds by classes.

        Parameters
        ----------
        classes : int array, shape (rows, columns)
            Class of every grid point.
        count : int, optional
            How many classes there are; as many as occur unless given.
        """
        count = int(classes.max()) + 1 if count is None else count
        smoothness = self.kind * count + classes.ravel()[self.centre]
        return np.concatenate([self.survey, len(SURVEYS) + smoothness])

    def surface(self, log_weights: LogWeights, groups: Tensor, **settings: Any) -> Tensor:
        """argmin_x ||W^(1/2)(A x - b)||^2, in metres; differentiable in the log weights.

        Parameters
        ----------
        log_weights : LogWeights
            -inf leaves a kind of row out.
        groups : int Tensor, shape (m,)
            From :meth:`groups`.
        **settings
            Passed to :func:`funclsq.lstsq`.
        """
        every = torch.cat([t.flatten() for t in log_weights])
        A = Sparse(self.pattern, self.values)
        return lstsq(A, self.b, weights=every.exp()[groups], rank="full", **settings)


def classes(surface: np.ndarray, levels: tuple[float, ...]) -> np.ndarray:
    """Class every grid point by the steepness around it: 0 (the flattest), 1, ...

    Parameters
    ----------
    surface : array, shape (rows, columns)
        A first reconstruction; never the truth.
    levels : tuple of float
        The shares of the area that lie below each class boundary.
    """
    dy, dx = np.gradient(ndimage.gaussian_filter(surface, 2.0))
    steepness = ndimage.gaussian_filter(np.hypot(dx, dy), 6.0)
    return np.digitize(steepness, np.quantile(steepness, levels))
