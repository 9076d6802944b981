"""Stand-ins for the equinox modules where equinox is not installed."""

from __future__ import annotations

from typing import Any

__all__ = ["LeastSquares", "SparseLinear"]


class _NeedsEquinox:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError(
            f"funclsq.jax.{type(self).__name__} needs equinox. Install it with "
            "pip install 'funclsq[jax]'."
        )


class LeastSquares(_NeedsEquinox):
    """Needs equinox."""


class SparseLinear(_NeedsEquinox):
    """Needs equinox."""
