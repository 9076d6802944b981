"""What must hold of any problem, on random ones (generators and checks in fuzz.py).

FUNCLSQ_FUZZ=20 runs twenty times as many cases, drawn anew; ``python -m tests.fuzz`` many more.
"""

from __future__ import annotations

import dataclasses
import os

import fuzz
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import funclsq as fl

MORE = int(os.environ.get("FUNCLSQ_FUZZ", "0"))
mild = fuzz.cases(mild=True)
single = fuzz.cases(mild=True, batches=False)


def run(strategy, test, examples):
    if MORE:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        fuzz.run(strategy, test, examples * MORE, seed)
    else:
        fuzz.run(strategy, test, examples)


def close(case, x, want, movement, factor=100):
    error = float(np.linalg.norm(x.to(torch.complex128).numpy() - want))
    allowed = factor * max(*case.A.shape[-2:], 1) * movement
    assert error <= allowed + 1e-300, f"{case.solver}: error {error:.2e} exceeds {allowed:.2e}"


def solved(case):
    sol, _ = fuzz.solve(case)
    return sol.x if bool(sol.converged.all()) else None


def test_any_problem_is_solved_or_said_not_to_be():
    run(fuzz.cases(), fuzz.check, 300)


def test_a_larger_sparse_problem_is_solved_or_said_not_to_be():
    run(fuzz.cases(large=True), fuzz.check, 80)


def test_mild_problems_have_the_solution_of_least_norm():
    def check(case):
        fuzz.check(case)
        known, x = fuzz.dense(case), solved(case)
        if known is not None and x is not None:
            close(case, x, *known)

    run(single, check, 200)


def test_direct_solvers_always_solve_mild_problems():
    def check(case):
        case = dataclasses.replace(case, solver=case.solver if case.solver != "auto" else "qr")
        assert case.solver not in ("qr", "svd", "cholesky") or solved(case) is not None

    run(single, check, 100)


@st.composite
def pairs(draw, change):
    """A case and another one, of which the solution follows."""
    case = draw(single)
    rng = np.random.default_rng(case.seed)
    return case, *change(case, rng)


def _rebuilt(case, A, layout="dense", **more):
    row, col = np.nonzero((A != 0).numpy())
    solver = case.solver if layout != "operator" else "auto"
    return dataclasses.replace(
        case, A=A.contiguous(), row=row, col=col, layout=layout, solver=solver, **more
    )


def _rows_permuted(case, rng):
    p = torch.from_numpy(rng.permutation(case.A.shape[0]))
    w = None if case.weights is None else case.weights[p]
    return _rebuilt(case, case.A[p], "sparse", b=case.b[p], weights=w), lambda x: x


def _columns_permuted(case, rng):
    p = torch.from_numpy(rng.permutation(case.A.shape[1]))
    damp = case.damp[p] if isinstance(case.damp, torch.Tensor) and case.damp.ndim else case.damp
    x0 = None if case.x0 is None else case.x0[p]
    return _rebuilt(case, case.A[:, p], "dense", damp=damp, x0=x0), lambda x: x[p]


def _rows_rotated(case, rng):
    m = case.A.shape[0]
    Q, _ = np.linalg.qr(rng.standard_normal((m, m)))
    Q = torch.from_numpy(Q).to(case.dtype)
    case = dataclasses.replace(case, weights=None)
    return _rebuilt(case, Q @ case.A, "sparse", b=Q @ case.b), None


def _columns_scaled(case, rng):
    n = case.A.shape[1]
    s = torch.from_numpy(2.0 ** rng.integers(-3, 4, n)).to(case.dtype.to_real())
    case = dataclasses.replace(case, damp=torch.as_tensor(case.damp, dtype=s.dtype) + 0 * s)
    divided = lambda x: x / (s if x.ndim == 1 else s[:, None])  # noqa: E731
    x0 = None if case.x0 is None else divided(case.x0)
    return (
        _rebuilt(case, case.A * s, "sparse", damp=case.damp * s, x0=x0),
        divided,
    )


@pytest.mark.parametrize("change", [_rows_permuted, _columns_permuted, _rows_rotated])
def test_the_solution_follows(change):
    def check(drawn):
        case, other, follow = drawn
        if follow is None:
            case, follow = dataclasses.replace(case, weights=None), lambda x: x
        known, x, y = fuzz.dense(case), solved(case), solved(other)
        if known is not None and x is not None and y is not None:
            want, movement = known
            close(case, x, want, movement)
            close(case, y, follow(torch.from_numpy(want)).numpy(), movement)

    run(pairs(change), check, 60)


def test_the_solution_follows_a_scaling_of_columns_where_the_rank_is_full():
    def check(drawn):
        case, other, follow = drawn
        known = fuzz.dense(case)
        A, w, n = case.A.to(torch.complex128), case.weights, case.A.shape[1]
        damp = torch.as_tensor(case.damp, dtype=torch.float64).expand(n)
        root = torch.ones(len(A)) if w is None else w.sqrt()
        if known is None or (w is not None and w.ndim == 2) or n == 0:
            return
        B = torch.cat((root[:, None] * A, torch.diag(damp).to(A.dtype)))
        y = solved(other)
        if y is not None and int(torch.linalg.matrix_rank(B, rtol=1e-10)) == n:
            close(other, y, follow(torch.from_numpy(known[0])).numpy(), 64 * known[1])

    run(pairs(_columns_scaled), check, 60)


def test_a_batch_is_its_members_and_a_stack_under_vmap():
    def check(case):
        if case.A.ndim == 2 or 0 in case.A.shape[:-2] or case.layout != "dense":
            return
        whole = solved(case)
        if whole is None:
            return
        A, b = case.A.flatten(0, -3), case.b.flatten(0, -3)
        whole = whole.flatten(0, -3)
        more = {"damp": case.damp, "weights": case.weights, "x0": case.x0, "solver": case.solver}

        def f(A, b):
            return fl.lstsq(A, b, on_failure="ignore", **more)

        mapped = torch.func.vmap(f)(A, b)
        for i in range(len(A)):
            one = dataclasses.replace(case, A=A[i], b=b[i])
            known = fuzz.dense(one)
            if known is not None:
                close(one, whole[i], *known)
                close(one, mapped[i], *known)
                x = solved(one)
                assert x is None or close(one, x, *known) is None

    batches = fuzz.cases(mild=True).filter(lambda c: c.A.ndim > 2 and c.layout == "dense")
    run(batches, check, 60)


def test_gradients_are_finite_and_follow_scalings():
    run(single, fuzz.check_gradients, 100)


def test_bad_input_is_refused():
    def check(case):
        given = [case.A, case.b, case.weights, case.x0]
        spots = [i for i, t in enumerate(given) if t is not None and t.numel()]
        if case.layout == "repeated" or not spots or 0 in (*case.A.shape, *case.b.shape):
            return
        rng = np.random.default_rng(case.seed)
        at = int(rng.choice(spots))
        bad = given[at].clone()
        bad.view(-1)[int(rng.integers(bad.numel()))] = float(rng.choice((np.nan, np.inf)))
        given[at] = bad
        A, b, w, x0 = given
        row, col = np.nonzero((A != 0).reshape(-1, *A.shape[-2:]).any(0).numpy())
        spoilt = dataclasses.replace(case, A=A, b=b, weights=w, x0=x0, row=row, col=col)
        with pytest.raises(ValueError, match="must be finite"):
            fuzz.solve(spoilt)

    run(mild, check, 60)
