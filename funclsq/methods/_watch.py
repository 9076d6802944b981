"""What a run's stopping tests see: estimates of every column, as of the step at which it stopped.

On the CPU the host tests after every step, and sees the state as it is (:class:`HostWatch`). On an
accelerator it looks every few steps only, and a column must not go on until then: steps beyond
convergence divide rounding by rounding, and where A is rank deficient they bring it into x. So
there the tests for convergence are made by the device as well, after every step, which freezes the
column and its estimates (:class:`DeviceWatch`); a look of the host is one transfer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funclsq.methods._scalars import Scalars, TensorScalars

__all__ = ["XNORM_EVERY", "DeviceWatch", "HostWatch", "Look", "Tests", "watch_for"]

XNORM_EVERY = 10  # ||x_k|| only grows, so an old value is a safe one in the test for A x = b


class Tests(NamedTuple):
    """Tests for convergence, each array (..., k): see ``Targets``.

    ||A^H r|| <= max(atol ||A|| max(||r||, outer), goal), or, where ``consistent``,
    ||r|| <= floor + atol ||A|| ||x||, the last term only up to ``limit``.
    """

    atol: float
    consistent: bool
    outer: np.ndarray
    goal: np.ndarray
    floor: np.ndarray
    limit: np.ndarray


class Look(NamedTuple):
    """What the host sees of each column, arrays (..., k); ``met``: stopped by its own tests."""

    rnorm: np.ndarray
    arnorm: np.ndarray
    anorm: np.ndarray
    acond: np.ndarray
    xnorm: np.ndarray
    steps: np.ndarray
    met: np.ndarray


class HostWatch:
    """Scalars that are NumPy arrays: nothing is tested here."""

    def __init__(self, state: Any, scalars: Scalars, tests: Tests, xnorm: np.ndarray) -> None:
        self._state, self._scalars, self._steps = state, scalars, 0
        self._tests, self._xnorm = tests, xnorm

    def stepped(self) -> None:
        """A step was made."""
        self._steps += 1

    def look(self) -> Look:
        """Return what there is to see now."""
        s, scalars = self._state, self._scalars
        if self._tests.consistent and self._steps % XNORM_EVERY == 0:
            self._xnorm = np.fmax(self._xnorm, scalars.norm(s.x))
        rnorm, arnorm, anorm, acond = s.rnorm, s.arnorm, s.anorm, s.acond
        steps, met = np.full(rnorm.shape, self._steps), np.zeros(rnorm.shape, dtype=bool)
        return Look(rnorm, arnorm, anorm, acond, self._xnorm, steps, met)

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns."""
        self._xnorm = self._xnorm[..., columns.numpy()]


class DeviceWatch:
    """Scalars on an accelerator, tested there after every step: sixteen small operations."""

    def __init__(self, state: Any, scalars: TensorScalars, tests: Tests, xnorm: np.ndarray) -> None:
        self._state, self._scalars, self._steps = state, scalars, 0
        self._atol, self._consistent = tests.atol, tests.consistent
        self._zero = torch.zeros((), dtype=torch.float64, device=scalars.active.device)
        fixed = np.stack(np.broadcast_arrays(*tests[2:], xnorm))
        self._fixed = torch.from_numpy(fixed).to(scalars.active.device)
        self._seen = self._now()

    def _now(self) -> Tensor:
        s = self._state
        values = (s.rnorm, s.arnorm, s.anorm, s.acond)
        return torch.stack((*values, self._scalars.full(self._steps)))

    def stepped(self) -> None:
        """Note what is seen of the columns that are active, and freeze those that have stopped."""
        self._steps += 1
        active, now = self._scalars.active, self._now()
        self._seen = torch.where(active, now, self._seen)
        rnorm, arnorm, anorm = now[:3].unbind()
        outer, goal, floor, limit, xnorm = self._fixed.unbind()
        level = torch.maximum(self._atol * anorm * torch.fmax(rnorm, outer), goal)
        going = active & (arnorm > level)  # false where one is not a number
        if self._consistent:
            image = anorm * xnorm
            going &= rnorm > floor + self._atol * torch.where(image <= limit, image, self._zero)
        self._scalars.active = going

    def look(self) -> Look:
        """Return what was seen of each column before it stopped, in one transfer."""
        xnorm = self._fixed[4]
        if self._consistent:
            torch.fmax(xnorm, self._scalars.norm(self._state.x), out=xnorm)
        more = torch.stack((xnorm, (~self._scalars.active).to(xnorm.dtype)))
        rnorm, arnorm, anorm, acond, steps, xnorm, met = torch.cat((self._seen, more)).cpu().numpy()
        return Look(rnorm, arnorm, anorm, acond, xnorm, steps.astype(np.int64), met != 0)

    def keep(self, columns: Tensor) -> None:
        """Drop all but these columns."""
        self._fixed, self._seen = (t.index_select(-1, columns) for t in (self._fixed, self._seen))


def watch_for(
    state: Any, scalars: Scalars, tests: Tests, xnorm: np.ndarray
) -> HostWatch | DeviceWatch:
    """Choose by where the scalars live."""
    kind = DeviceWatch if isinstance(scalars, TensorScalars) else HostWatch
    return kind(state, scalars, tests, xnorm)
