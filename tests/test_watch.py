"""Stopping on a device: tested there after every step, seen by the host every eighth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funclsq.methods import _iterate
from funclsq.methods._iterate import Targets, iterate
from funclsq.methods._scalars import ArrayScalars, TensorScalars
from funclsq.solution import Status

STEPS, K = 60, 40


class Scripted:
    """A method whose estimates are written down: arrays (steps + 1, ..., k)."""

    def __init__(self, script, scalars, x):
        self.script, self.scalars, self.x = script, scalars, x.clone()
        self.at, self.columns = 0, np.arange(x.shape[-1])
        self._show()

    def _show(self):
        for name, values in self.script.items():
            now = values[self.at][..., self.columns]
            setattr(self, name, torch.from_numpy(now) if self._tensors else now)

    @property
    def _tensors(self):
        return isinstance(self.scalars, TensorScalars)

    def step(self):
        self.at += 1
        self._show()
        active = torch.as_tensor(self.scalars.active)  # what a step adds to x
        self.x += active.unsqueeze(-2) * 1e-3

    def keep(self, columns):
        self.columns = self.columns[columns.numpy()]
        self.x = self.x.index_select(-1, columns)
        self._show()


def script(seed, lead=()):
    """Estimates that fall at rates of their own, some to a floor, some to no number at all."""
    rng = np.random.default_rng(seed)
    step = np.arange(STEPS + 1).reshape(-1, *[1] * len(lead), 1)
    rate, low = rng.uniform(0.2, 2, (2, *lead, K))
    rnorm = np.exp(-rate * step) + np.where(rng.random((*lead, K)) < 0.5, low, 0)
    arnorm = 3 * np.exp(-rng.uniform(0.2, 2, (*lead, K)) * step)
    never = rng.integers(1, 2 * STEPS, (*lead, K))
    arnorm[(step >= never) & (step > 3)] = np.nan
    arnorm[..., 0] = 0  # the start solves
    anorm = 2 + 0.1 * np.sqrt(step) * rng.random((*lead, K))
    return {"rnorm": rnorm, "arnorm": arnorm, "anorm": anorm, "acond": 1.0 + anorm * step}


def run(kind, seed, lead=(), maxiter=STEPS, report=None, **changes):
    x = torch.ones((*lead, 5, K), dtype=torch.float64)
    shape = (*lead, K)
    scalars = kind(shape) if kind is ArrayScalars else kind(shape, x.device)
    settings = {
        "atol": 1e-6,
        "btol": 1e-7,
        "conlim": np.inf,
        "at_eps": False,
        "bnorm": np.linspace(1, 3, K) * np.ones(shape),
        "xnorm": np.full(shape, 10.0),
        "rnorm": np.linspace(0, 2, K) * np.ones(shape),
        "xlimit": 1e9,
    }
    targets = Targets(**(settings | changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_iterate, "scalars_for", lambda rhs: scalars)
        lines = script(seed, lead)
        return iterate(lambda op, rhs, s: Scripted(lines, s, x), None, x, targets, maxiter, report)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"consistent": False},
        {"reduction": 1e-3},
        {"xlimit": 6.0, "btol": 1e-4},
        {"at_eps": True, "rnorm": np.zeros(K)},
        {"atol": 1e-3, "btol": 0.0},
        {"xnorm": np.full(K, np.inf)},
    ],
    ids=str,
)
@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("seed", [0, 1])
def test_columns_stop_where_the_host_would_stop_them(seed, lead, changes):
    host = run(ArrayScalars, seed, lead, **changes)
    device = run(TensorScalars, seed, lead, **changes)
    assert np.array_equal(host.status, device.status)
    assert np.array_equal(host.iterations, device.iterations)
    assert np.array_equal(host.anorm, device.anorm)
    assert np.array_equal(host.acond, device.acond)
    # converged columns made no step more (those that a NaN ended may be anything)
    told = torch.from_numpy(host.status != int(Status.NONFINITE)).unsqueeze(-2)
    assert torch.equal(torch.where(told, host.x, 0), torch.where(told, device.x, 0))
    assert {Status(int(s)) for s in host.status.flat} >= {Status.START_SOLVES, Status.NONFINITE}
    assert len({int(i) % 8 for i in device.iterations.flat}) > 4  # not at looks only


def test_what_only_the_host_tests_is_found_at_its_next_look():
    limit = {"conlim": 30.0, "atol": 0.0, "btol": 0.0}
    host, device = (run(kind, 2, **limit) for kind in (ArrayScalars, TensorScalars))
    stopped = (host.status == int(Status.CONDITION_LIMIT)) & (device.status == host.status)
    assert stopped.sum() > K // 3
    late = (device.iterations - host.iterations)[stopped]
    assert late.min() >= 0 and late.max() <= 7
    assert np.all(device.iterations[stopped] % 8 == 0)


@pytest.mark.parametrize("maxiter", [1, 7, 8, 12])
def test_the_last_steps_are_counted(maxiter):
    host, device = (run(kind, 3, maxiter=maxiter) for kind in (ArrayScalars, TensorScalars))
    assert np.array_equal(host.status, device.status)
    assert np.array_equal(host.iterations, device.iterations)
    assert (host.iterations[host.status == int(Status.MAXITER)] == maxiter).all()


def test_a_report_sees_the_same_and_ends_the_run():
    seen = []

    def report(count, active, rnorm, arnorm):
        seen.append((count, int(active.sum()), rnorm.size))
        return count >= 16

    device = run(TensorScalars, 4, report=report)
    assert [count for count, *_ in seen] == [8, 16]
    assert seen[0][1] > seen[1][1] > 0
    assert (device.status == int(Status.INTERRUPTED)).sum() == seen[1][1]


def test_a_larger_x_is_known_from_the_next_look_on():
    # ||A|| ||x|| counts in the test for A x = b: with xnorm 0 at the start, x has norm 5^(1/2)
    changes = {"xnorm": np.zeros(K), "atol": 0.01, "btol": 0.0, "rnorm": np.zeros(K)}
    host, device = (run(kind, 5, **changes) for kind in (ArrayScalars, TensorScalars))
    solved = (host.status == int(Status.RESIDUAL_SMALL)) & (device.status == host.status)
    assert solved.any()
    assert (device.iterations[solved] >= 8).all() and (host.iterations[solved] >= 10).all()
