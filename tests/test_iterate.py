"""Each test that ends a run, just met and just missed, by one column, by a block and by members.

The estimates of the method are written down, so that what has to happen is known without a solve.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funclsq.methods import _iterate
from funclsq.methods._iterate import Targets, iterate
from funclsq.methods._scalars import FloatScalars
from funclsq.methods._watch import XNORM_EVERY
from funclsq.solution import Status

NEAR = 0.004  # how far, relative to a threshold, one is that is just met or missed
STEPS = 9
ATOL, BTOL, CONLIM, REDUCTION = 3e-4, 2e-5, 70.0, 1e-2
BNORM, XNORM, OUTER, XLIMIT = 5.0, 1.7, 0.9, 2.6
# what no test takes notice of: A^H r far from small, r as well, A x below its limit
QUIET = {"rnorm": 0.8, "arnorm": 0.5, "anorm": 2.0, "acond": 10.0}


class Scripted:
    """A method whose estimates are given: arrays (steps + 1, ..., k); x counts the steps."""

    def __init__(self, op, rhs, scalars, script, size=0.0):
        self.script, self.scalars, self.size = script, scalars, size
        self.x = rhs[..., :1, :].clone()
        self.at, self.columns, self.kept = 0, np.arange(rhs.shape[-1]), []
        self._show()

    def _show(self):
        for name, values in self.script.items():
            now = values[self.at][..., self.columns]
            setattr(self, name, float(now[0]) if isinstance(self.scalars, FloatScalars) else now)

    def step(self):
        self.at += 1
        self._show()
        active = np.atleast_1d(self.scalars.active)
        self.x = self.x + torch.from_numpy(active).unsqueeze(-2) * (1.0 + self.size)

    def keep(self, columns):
        self.kept.append(len(columns))
        self.columns = self.columns[columns.numpy()]
        self.x = self.x.index_select(-1, columns)
        self._show()


def quiet(**changes):
    """Estimates of one column: quiet ones, and from some step on others."""
    script = {name: np.full(STEPS + 1, value) for name, value in QUIET.items()}
    # what ||A^H r|| falls by keeps the patience
    script["arnorm"] = script["arnorm"] * 0.99 ** np.arange(STEPS + 1)
    for name, (step, value) in changes.items():
        script[name][step:] = value
    return script


def at(step, sign, **thresholds):
    """Estimates that meet (sign -1) or miss (1) thresholds by a little, from this step on."""
    return quiet(**{name: (step, t * (1 + sign * NEAR)) for name, t in thresholds.items()})


def columns(sign):
    """Scripts, each with the status that it ends with where sign is -1 and the step."""
    image = QUIET["anorm"] * XNORM
    small, met = Status.NORMAL_RESIDUAL_SMALL, Status.RESIDUAL_SMALL
    level = ATOL * QUIET["anorm"]
    yield at(2, sign, arnorm=level * OUTER), small, 2
    large = at(3, sign, arnorm=level * 1.3)  # ||r|| counts where it is larger than that before
    large["rnorm"][:] = 1.3
    yield large, small, 3
    yield at(5, sign, rnorm=BTOL * BNORM + ATOL * image), met, 5
    blown = at(6, sign, rnorm=BTOL * BNORM)  # A x is of no use to tell how small r may be
    blown["anorm"][:] = XLIMIT * BNORM / XNORM * (1 + NEAR)
    yield blown, met, 6
    usable = at(6, sign, rnorm=BTOL * BNORM + ATOL * XLIMIT * BNORM * (1 - NEAR))
    usable["anorm"][:] = XLIMIT * BNORM / XNORM * (1 - NEAR)
    yield usable, met, 6
    yield at(7, -sign, acond=CONLIM), Status.CONDITION_LIMIT, 7
    start = at(0, sign, arnorm=level * OUTER)
    start["arnorm"][1:] = 1e-20
    yield start, Status.START_SOLVES, 0
    longer = at(0, sign, arnorm=level * 1.3)
    longer["rnorm"][:] = 1.3
    longer["arnorm"][1:] = 1e-20
    yield longer, Status.START_SOLVES, 0


def targets(shape, **changes):
    full = {name: np.full(shape, value) for name, value in
            {"bnorm": BNORM, "xnorm": XNORM, "rnorm": OUTER}.items()}  # fmt: skip
    given = {"reduction": 0.0, "conlim": CONLIM, "xlimit": XLIMIT, "at_eps": False} | changes
    return Targets(atol=ATOL, btol=BTOL, **full, **given)


def run(scripts, kind, maxiter=STEPS, report=None, **changes):
    """Status, iterations, x, ||A|| and cond of each script, run in one of three ways."""
    if kind == "one":
        results = [_run([script], (1,), maxiter, report, changes) for script in scripts]
    elif kind == "block":
        results = [_run(scripts, (len(scripts),), maxiter, report, changes)]
    else:
        twice = [*scripts, *scripts]
        results = [_run(twice, (2, len(scripts)), maxiter, report, changes)]
        for a in results[0]:
            np.testing.assert_array_equal(a[: len(scripts)], a[len(scripts) :])
        results = [tuple(a[: len(scripts)] for a in results[0])]
    return [np.concatenate(parts) for parts in zip(*results)]


def _run(scripts, shape, maxiter, report, changes):
    changes = dict(changes)
    size = changes.pop("size", 0.0)
    stacked = {name: np.stack([s[name] for s in scripts], -1).reshape(-1, *shape) for name in QUIET}
    rhs = torch.zeros(*shape[:-1], 4, shape[-1], dtype=torch.float64)
    out = iterate(
        Scripted, None, rhs, targets(shape, **changes), maxiter, report, script=stacked, size=size
    )
    x = out.x.squeeze(-2).numpy()
    return [np.ravel(a) for a in (out.status, out.iterations, x, out.anorm, out.acond)]


KINDS = ("one", "block", "members")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_eps", [False, True])
def test_thresholds(kind, at_eps):
    name = {
        Status.RESIDUAL_SMALL: Status.RESIDUAL_AT_EPS,
        Status.NORMAL_RESIDUAL_SMALL: Status.NORMAL_RESIDUAL_AT_EPS,
    }
    changes = {"at_eps": at_eps}
    scripts, wanted, steps = zip(*columns(-1))
    status, iterations, x, anorm, acond = run(scripts, kind, **changes)
    assert [Status(s) for s in status] == [name.get(w, w) if at_eps else w for w in wanted]
    np.testing.assert_array_equal(iterations, steps)
    np.testing.assert_array_equal(x, steps)  # nothing is added to a column that has stopped
    np.testing.assert_array_equal(anorm, [s["anorm"][i] for s, i in zip(scripts, steps)])
    moved = [i for i, step in enumerate(steps) if step]
    np.testing.assert_array_equal(acond[moved], [scripts[i]["acond"][steps[i]] for i in moved])
    missed = [script for script, status, _ in columns(1) if status != Status.START_SOLVES]
    status, iterations, x, *_ = run(missed, kind, **changes)
    assert {Status(s) for s in status} == {Status.MAXITER}
    np.testing.assert_array_equal(iterations, STEPS)
    np.testing.assert_array_equal(x, STEPS)
    starts = [script for script, status, _ in columns(1) if status == Status.START_SOLVES]
    assert (run(starts, kind, **changes)[1] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reduction_of_what_the_run_began_with(kind):
    met, missed = (at(4, sign, arnorm=REDUCTION * QUIET["arnorm"]) for sign in (-1, 1))
    status, iterations, *_ = run([met, missed], kind, reduction=REDUCTION)
    assert [Status(s) for s in status] == [Status.NORMAL_RESIDUAL_SMALL, Status.MAXITER]
    np.testing.assert_array_equal(iterations, [4, STEPS])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_ends_the_run(kind):
    scripts = [quiet(**{name: (3, value)}) for name in ("rnorm", "arnorm")
               for value in (np.inf, np.nan)]  # fmt: skip
    scripts.append(quiet(rnorm=(4, 1e300), arnorm=(4, 1e300)))
    status, iterations, *_ = run(scripts, kind, conlim=np.inf)
    assert [Status(s) for s in status] == [Status.NONFINITE] * 4 + [Status.MAXITER]
    np.testing.assert_array_equal(iterations, [3] * 4 + [STEPS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounded", [False, True])
def test_a_bound_on_x(kind, bounded):
    over, below = (quiet(anorm=(5, XLIMIT * BNORM / XNORM * (1 + sign * NEAR))) for sign in (1, -1))
    status, iterations, *_ = run([over, below], kind, bounded=bounded)
    first = (Status.STAGNATED, 5) if bounded else (Status.MAXITER, STEPS)
    assert [Status(s) for s in status] == [first[0], Status.MAXITER]
    np.testing.assert_array_equal(iterations, [first[1], STEPS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_hand_side_of_the_domain_has_no_residual(kind):
    script = quiet(rnorm=(2, 1e-12))
    assert Status(run([script] * 2, kind)[0][0]) == Status.RESIDUAL_SMALL
    assert Status(run([script] * 2, kind, consistent=False)[0][0]) == Status.MAXITER


@pytest.mark.parametrize("kind", KINDS)
def test_x_is_measured_every_few_steps(kind):
    grown = XNORM_EVERY * 1000.0  # of x after as many steps of size 1000
    image = QUIET["anorm"] * grown
    late = {name: np.full(2 * XNORM_EVERY + 1, value) for name, value in QUIET.items()}
    late["rnorm"][1:] = (BTOL * BNORM + ATOL * image) * (1 - NEAR)
    late["arnorm"] = np.maximum(late["arnorm"], 100 * late["rnorm"])
    options = {"size": 999.0, "maxiter": 2 * XNORM_EVERY, "xlimit": np.inf}
    status, iterations, *_ = run([late] * 2, kind, **options)
    assert {Status(s) for s in status} == {Status.RESIDUAL_SMALL}
    np.testing.assert_array_equal(iterations, XNORM_EVERY)


@pytest.mark.parametrize("kind", KINDS)
def test_patience(kind, monkeypatch):
    """It is lost two steps after the least ||A^H r||, or after as many as that took."""
    monkeypatch.setattr(_iterate, "_PATIENCE", 2)
    early, late, again = quiet(), quiet(), quiet()
    early["arnorm"][2:] = early["arnorm"][1]  # at step 1: until step 3
    late["arnorm"][4:] = 0.499  # at step 3: until step 6
    again["arnorm"][2:] = 0.499
    again["arnorm"][3] = 0.48
    again["arnorm"][6:] = 0.47  # at steps 3 and 6
    status, iterations, *_ = run([early, late, again], kind)
    assert [Status(s) for s in status] == [Status.STAGNATED] * 2 + [Status.MAXITER]
    np.testing.assert_array_equal(iterations, [4, 7, STEPS])


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_sees_every_step_and_ends_the_run(kind):
    seen = []

    def report(count, active, rnorm, arnorm):
        seen.append((count, active.copy(), rnorm, arnorm))
        return count == 4

    quick = quiet(arnorm=(2, 1e-12))
    status, iterations, *_ = run([quick, quiet()], kind, report=report)
    assert [Status(s) for s in status] == [Status.NORMAL_RESIDUAL_SMALL, Status.INTERRUPTED]
    np.testing.assert_array_equal(iterations, [2, 4])
    last = [entry for entry in seen if entry[0] == 4][-1]
    assert last[1].any() and np.ravel(last[2])[-1] == QUIET["rnorm"]
    assert np.ravel(last[3])[-1] == quiet()["arnorm"][4]


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_is_allowed(kind):
    status, iterations, x, *_ = run([quiet()] * 2, kind, maxiter=0)
    assert {Status(s) for s in status} == {Status.MAXITER}
    assert not iterations.any() and not x.any()


@pytest.mark.parametrize(("stopped", "kept"), [(99, []), (100, [300])])
def test_columns_are_dropped_once_a_quarter_has_stopped(stopped, kept):
    states = []

    def method(*args, **extra):
        states.append(Scripted(*args, **extra))
        return states[-1]

    scripts = [quiet(arnorm=(2, 1e-12))] * stopped + [quiet()] * (400 - stopped)
    stacked = {name: np.stack([s[name] for s in scripts], -1) for name in QUIET}
    rhs = torch.zeros(4, 400, dtype=torch.float64)
    out = iterate(method, None, rhs, targets((400,)), STEPS, script=stacked)
    assert states[0].kept == kept
    np.testing.assert_array_equal(out.iterations, [2] * stopped + [STEPS] * (400 - stopped))
    np.testing.assert_array_equal(out.x.squeeze(0).numpy(), out.iterations)
