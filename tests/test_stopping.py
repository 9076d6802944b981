"""A solve stops when it is done, says why, and is told from one that merely stopped."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from realdata import data_path

import funclsq as fl

KRYLOV = ("lsmr", "lsqr", "cgls")
Status = fl.Status


def spread(m=40, n=20, cond=1e3, seed=0):
    """A dense problem of this condition number, with a residual."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, n)))[0] for k in (m, n))
    A = (U * np.geomspace(1, 1 / cond, n)) @ V.T
    return torch.from_numpy(A), torch.from_numpy(rng.standard_normal(m))


def status(A, b, **options):
    sol = fl.solve(A, b, on_failure="ignore", **options)
    return Status(int(sol.status)), sol


@pytest.mark.parametrize(
    ("solver", "atol"),
    [("auto", None), *((solver, atol) for solver in KRYLOV for atol in (None, 1e-15))],
)
def test_insteval_ends_at_its_minimum_or_says_that_it_does_not(solver, atol):
    """Column-scaled InstEval, rank 4105 of 4126: SciPy's LSMR says success at 309.5896."""
    z = np.load(data_path("regression/insteval.npz"))
    A = scipy.sparse.csc_array((z["data"], z["indices"], z["indptr"]), shape=tuple(z["shape"]))
    A = A @ scipy.sparse.diags_array(1 / scipy.sparse.linalg.norm(A, axis=0))
    b = torch.from_numpy(z["b"].astype(float).ravel())
    code, sol = status(fl.Sparse.from_scipy(A), b, solver=solver, atol=atol, btol=atol)
    honest = abs(float(sol.residual_norm) - 309.58495399) < 1e-7
    assert honest or not code.converged
    assert honest or atol is not None


def test_every_status_says_what_to_do():
    for code in Status:
        assert len(code.advice) > 10
    assert not Status.CONDITION_LIMIT.converged
    assert not Status.STAGNATED.converged
    assert Status.DIRECT.converged


REACHED = {
    "zero right-hand side": (Status.START_SOLVES, lambda A, b: status(A, 0 * b, solver="lsmr")),
    "consistent": (
        Status.RESIDUAL_SMALL,
        lambda A, b: status(A, A @ A[0], solver="lsmr", atol=1e-8, btol=1e-8),
    ),
    "inconsistent": (
        Status.NORMAL_RESIDUAL_SMALL,
        lambda A, b: status(A, b, solver="lsmr", atol=1e-8, btol=1e-8),
    ),
    "condition": (
        Status.CONDITION_LIMIT,
        lambda A, b: status(A, b, solver="lsmr", conlim=10.0, scale=False),
    ),
    "consistent to rounding": (
        Status.RESIDUAL_AT_EPS,
        lambda A, b: status(A, A @ A[0], solver="lsmr"),
    ),
    "inconsistent to rounding": (
        Status.NORMAL_RESIDUAL_AT_EPS,
        lambda A, b: status(A, b, solver="lsmr"),
    ),
    "limit": (Status.MAXITER, lambda A, b: status(A, b, solver="lsmr", maxiter=2)),
    "direct": (Status.DIRECT, lambda A, b: status(A, b, solver="qr")),
    "not finite": (
        Status.NONFINITE,
        lambda A, b: status(1e-308 * A, 1e300 * b, solver="qr"),
    ),
}


@pytest.mark.parametrize("name", REACHED)
def test_status_is_reached(name):
    want, make = REACHED[name]
    code, sol = make(*spread())
    assert code == want
    assert bool(sol.converged) == want.converged
    assert want.name in sol.message
    assert want.advice in sol.message


def test_gradient_descent_says_that_it_diverged():
    A, b = spread()
    code, sol = status(A, b, solver=fl.solvers.gradient_descent, step=100.0)
    assert code in (Status.DIVERGED, Status.NONFINITE)


def test_failure_is_a_warning_an_error_or_left_alone():
    A, b = spread()
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER.*iterations 2"):
        fl.lstsq(A, b, solver="lsmr", maxiter=2)
    with pytest.raises(fl.ConvergenceError, match="MAXITER"):
        fl.lstsq(A, b, solver="lsmr", maxiter=2, on_failure="raise")
    fl.lstsq(A, b, solver="lsmr", maxiter=2, on_failure="ignore")


@pytest.mark.parametrize("solver", KRYLOV)
def test_status_is_by_member_inside_vmap(solver):
    easy, b = spread(cond=2)
    hard, _ = spread(cond=1e6, seed=1)
    A = torch.stack((easy, hard, easy))
    bs = torch.stack((b, b, 0 * b))

    def f(A, b):
        return fl.solve(A, b, solver=solver, maxiter=30, on_failure="ignore", scale=False)

    sol = torch.func.vmap(f)(A, bs)
    codes = [Status(int(s)) for s in sol.status]
    assert [c.converged for c in codes] == [True, False, True]
    assert codes[1] == Status.MAXITER
    assert codes[2] == Status.START_SOLVES
    assert int(sol.iterations[0]) < int(sol.iterations[1])
    assert "1 of 3" in sol.message
    assert "member 1" in sol.message
    x = torch.linalg.lstsq(easy, b[:, None]).solution[:, 0]
    torch.testing.assert_close(sol.x[0], x, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("solver", KRYLOV)
def test_members_that_have_converged_stay_bit_for_bit(solver):
    easy, b = spread(cond=2)
    hard, _ = spread(cond=1e6, seed=1)
    A, bs = torch.stack((easy, hard)), torch.stack((b, b))[..., None]

    def member(maxiter):
        return fl.solve(A, bs, solver=solver, maxiter=maxiter, on_failure="ignore", scale=False)

    first = member(60)
    assert bool(first.converged[0])
    assert not bool(first.converged[1])
    later = member(90)
    assert torch.equal(first.x[0], later.x[0])
    assert not torch.equal(first.x[1], later.x[1])


@pytest.mark.parametrize("solver", KRYLOV)
def test_an_interrupt_leaves_no_state(solver):
    A, b = spread(cond=1e4)
    calls = []

    def interrupt(state):
        calls.append(state["iteration"])
        if len(calls) == 3:
            raise KeyboardInterrupt

    before = fl.lstsq(A, b, solver=solver)
    with pytest.raises(KeyboardInterrupt):
        fl.lstsq(A.clone(), b, solver=solver, callback=interrupt)
    assert len(calls) == 3
    assert torch.equal(fl.lstsq(A, b, solver=solver), before)
    again = fl.lstsq(A, b, solver=solver, callback=lambda state: None)
    assert torch.equal(again, before)


# The process sends itself SIGINT, as Ctrl-C does, in the middle of a solve that would take days.
SIGINT = """
import os, signal, sys, threading, time, warnings
import numpy as np, torch
import funclsq as fl

what = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background jobs
rng = np.random.default_rng(0)
U, V = (np.linalg.qr(rng.standard_normal((200, 200)))[0] for _ in range(2))
A, b = (U * np.geomspace(1, 1e-9, 200)) @ V.T, rng.standard_normal(200)
small, c = A[:30, :8].copy(), b[:30].copy()
armed = []

def press(state):
    if state["iteration"] == 100 and not armed:
        armed.append(threading.Thread(target=lambda: os.kill(os.getpid(), signal.SIGINT)))
        armed[0].start()

def solve(A, b, **how):
    leaf = torch.from_numpy(A).requires_grad_()
    x = fl.lstsq(leaf, torch.from_numpy(b), **how)
    if what == "gradient":
        x.sum().backward()
    return x.detach().numpy()

forever = dict(solver=fl.solvers.gradient_descent if what == "descent" else "lsmr",
               rank="full", maxiter=10**9)
if what != "descent":
    forever["scale"] = False
before = solve(small, c, solver="lsmr")
try:
    solve(A, b, callback=press, **forever)
except KeyboardInterrupt:
    print("interrupted")
else:
    print("finished")
armed[0].join()
print("same" if np.array_equal(solve(small, c, solver="lsmr"), before) else "another answer")
"""


@pytest.mark.parametrize("what", ["torch", "gradient", "descent"])
def test_ctrl_c_stops_a_long_solve_and_the_next_one_is_right(what):
    script = [sys.executable, "-c", SIGINT, what]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["interrupted", "same"], done.stdout + done.stderr
    assert done.returncode == 0


def test_a_callback_sees_the_residuals_fall():
    A, b = spread(cond=100)
    seen = []
    sol = fl.solve(A, b, solver="lsmr", callback=lambda state: seen.append(dict(state)))
    assert len(seen) >= int(sol.iterations) - 1 > 5
    assert {"iteration", "active", "residual_norm", "normal_residual_norm"} <= set(seen[0])
    assert seen[-1]["normal_residual_norm"].max() < 1e-8 * seen[0]["normal_residual_norm"].max()


def test_progress_shows_a_bar(capfd):
    pytest.importorskip("tqdm")
    A, b = spread(cond=100)
    fl.lstsq(A, b, solver="lsmr", progress=True)
    assert "funclsq" in capfd.readouterr().err
