"""The elevation model that ships inside matplotlib: mountains around the Jacksboro fault."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["CROP", "MISSING", "Elevation", "load"]

CROP = (slice(90, 218), slice(130, 290))  # of --quick
MISSING = (
    "the elevation model and the picture need matplotlib, which is not installed. Install it with "
    "pip install 'funclsq[plot]'."
)
_METRES_PER_DEGREE = 111_195.0


@dataclasses.dataclass(frozen=True)
class Elevation:
    """Heights on a grid, rows from north to south.

    Parameters
    ----------
    heights : array, shape (rows, columns), metres
        The true surface.
    spacing : tuple of float, metres
        Distance of neighbouring rows, and of neighbouring columns.
    """

    heights: np.ndarray
    spacing: tuple[float, float]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = self.heights.shape
        return rows, columns


def load(*, quick: bool = False) -> Elevation:
    """Read the 344 x 403 heights (a crop of them if ``quick``).

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib import cbook
    except ImportError:
        raise ImportError(MISSING) from None
    with np.load(cbook.get_sample_data("jacksboro_fault_dem.npz", asfileobj=False)) as data:
        heights = data["elevation"].astype(np.float64)
        down = float(data["dy"]) * _METRES_PER_DEGREE
        right = float(data["dx"]) * _METRES_PER_DEGREE * np.cos(np.radians(float(data["ymax"])))
    return Elevation(heights[CROP] if quick else heights, (down, float(right)))
