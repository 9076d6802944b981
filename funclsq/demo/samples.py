"""Scattered noisy heights from two surveys of unequal quality, split three ways."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SURVEYS", "Samples", "Split", "Survey", "draw"]


class Survey(NamedTuple):
    """Who measured: a share of all samples, with noise of this standard deviation in metres."""

    name: str
    share: float
    noise: float


# The reconstruction is told which survey a sample comes from, and nothing of its noise.
SURVEYS = (Survey("new", 0.5, 5.0), Survey("old", 0.5, 60.0))


@dataclasses.dataclass(frozen=True)
class Samples:
    """Grid points (flat indices), the heights measured there in metres, and by which survey."""

    points: np.ndarray
    heights: np.ndarray
    survey: np.ndarray

    def __len__(self) -> int:
        return len(self.points)

    def of(self, survey: int) -> Samples:
        """Take one survey's samples."""
        return self[self.survey == survey]

    def __getitem__(self, index: np.ndarray) -> Samples:
        return Samples(self.points[index], self.heights[index], self.survey[index])

    def mean_square(self, surface: Tensor) -> Tensor:
        """Mean squared difference of a surface and the heights, square metres."""
        at = surface[torch.from_numpy(self.points)]
        return (at - torch.from_numpy(self.heights)).square().mean()


class Split(NamedTuple):
    """What the surface is fitted to, what its weights are learnt from, what both are judged by."""

    fit: Samples
    validation: Samples
    test: Samples


def draw(truth: np.ndarray, share: float = 0.05, seed: int = 0) -> Split:
    """Measure ``share`` of all heights: 60% of them to fit, 20% to validate, 20% to test."""
    rng = np.random.default_rng(seed)
    count = round(share * truth.size)
    points = rng.choice(truth.size, size=count, replace=False)
    survey = rng.choice(len(SURVEYS), size=count, p=[s.share for s in SURVEYS])
    noise = np.array([s.noise for s in SURVEYS])[survey]
    heights = truth.ravel()[points] + noise * rng.standard_normal(count)
    samples = Samples(points, heights, survey)
    parts = np.split(np.arange(count), [round(0.6 * count), round(0.8 * count)])
    return Split(*(samples[part] for part in parts))
