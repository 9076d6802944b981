"""What an oracle says of a quantity, and how sure it is."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = ["Estimate"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What an oracle says of a quantity.

    Parameters
    ----------
    value : array
        The quantity, or its products with ``along``.
    error : float
        The oracle's estimate of ``||value - true value||``.
    along : array, shape (p, ...), optional
        Directions d such that ``value[j] = Re <d[j], quantity>``.
    """

    value: np.ndarray
    error: float = 0.0
    along: np.ndarray | None = None

    def of(self, quantity: np.ndarray) -> np.ndarray:
        """Return what this estimates, taken from a full answer."""
        if self.along is None:
            return quantity
        return np.array([np.vdot(d, quantity).real for d in self.along])
