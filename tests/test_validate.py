"""The judges are judged: oracles agree with each other, and with this library."""

import json
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from checked import CASES, FAST, data_of, failing
from planted import planted

import funclsq as fl
from funclsq import validate
from funclsq.validate.closed_form import evaluate
from funclsq.validate.intake import as_problem
from funclsq.validate.maps_sparse import FactoredMaps, KrylovMaps, SparseMaps
from funclsq.validate.oracle_differences import differences
from funclsq.validate.oracle_mpmath import by_mpmath
from funclsq.validate.oracles_dense import autodiff, closed_form
from funclsq.validate.tangents import directions


def problem_of(A, b, damp=None, weights=None, x0=None):
    rng = np.random.default_rng(0)
    problem = as_problem(A, b, damp, weights, x0, "auto", rng)
    return problem, *(directions(problem, rng) for _ in range(3))


def far(a, b):
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.1)


# --- oracles against each other --------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_oracles_agree(name):
    problem, d, *probes = problem_of(**CASES[name])
    exact = by_mpmath(problem, d)
    found = closed_form(problem, d)
    guesses = differences(problem, d, probes)
    assert exact.keys() == found.keys() >= guesses.keys()
    for key, truth in exact.items():
        assert found[key].shape == truth.shape
        assert far(found[key], truth) < 1e-12, key
    for key, guess in guesses.items():
        truth = guess.of(exact[key])
        distance = np.linalg.norm(guess.value - truth)
        assert distance < 10 * guess.error + 1e-13 * max(np.linalg.norm(truth), 1), key


@pytest.mark.parametrize("name", ["weight 0", "wide"])
def test_autodiff_agrees(name):
    pytest.importorskip("jax")
    problem, d, *_ = problem_of(**CASES[name])
    found, truth = autodiff(problem, d), closed_form(problem, d)
    assert found.keys() == truth.keys()
    for key in found:
        assert far(found[key], truth[key]) < 1e-12, key


@pytest.mark.parametrize("name", ["tall", "damped, wide, complex", "deficient", "wide"])
def test_sparse_maps_agree_with_dense_ones(name):
    problem, d, *_ = problem_of(**CASES[name])
    truth = closed_form(problem, d)
    makers = [KrylovMaps, FactoredMaps] if problem.full_column_rank else [KrylovMaps]
    for make_maps in makers:
        for key, found in evaluate(problem, d, make_maps).items():
            assert far(found, truth[key]) < 1e-10, (make_maps, key)


def test_one_factor_serves_problems_close_by():
    problem, d, *_ = problem_of(**CASES["tall"])
    make_maps = SparseMaps()
    first = make_maps(problem)
    near, far_off = make_maps(problem.moved(d.tangents, 1e-3)), problem.moved(d.tangents, 1e3)
    assert near.factor is first.factor
    assert make_maps(far_off).factor is not first.factor


def test_refinement_says_when_it_cannot():
    A = np.vander(np.linspace(0, 1, 30), 12)
    problem, *_ = problem_of(A, np.ones(30))
    with pytest.raises(ArithmeticError, match="cond"):
        FactoredMaps(problem).T(np.ones((30, 1)))


# --- funclsq against the oracles -------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_funclsq_passes(name):
    report = validate.cross_check(
        **CASES[name],
        oracles=["closed form", "mpmath"],
        candidates={"torch": validate.torch_candidate()},
    )
    assert report, str(report)


def test_sparse_float32_and_columns():
    pattern = np.random.default_rng(3).random((8, 4)) < 0.6
    A = scipy.sparse.coo_array(np.where(pattern, data_of(8, 4)["A"], 0).astype(np.float32))
    b = data_of(8, 4, k=2)["b"].astype(np.float32)
    report = validate.cross_check(A, b, oracles=FAST, candidates={"t": validate.torch_candidate()})
    assert report, str(report)
    assert "float32" in str(report)
    assert min(row.tolerance for row in report.rows) > 1e-6


@pytest.mark.parametrize("name", ["damped", "deficient"])
def test_both_frameworks_and_all_oracles(name):
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    data = {key: a for key, a in CASES[name].items() if name == "damped" or key != "weights"}
    report = validate.cross_check(**data)
    assert report, str(report)
    assert {row.candidate for row in report.rows} == {"torch", "jax"}
    assert {row.oracle for row in report.rows} == {*validate.ORACLES, "torch"}
    inputs = {"A", "b", "x0"} | ({"damp", "weights"} if name == "damped" else set())
    names = {row.quantity for row in report.rows}
    assert names >= {f"{kind} {key}" for kind in ("vjp", "jvp", "hvp") for key in inputs}
    assert names >= {"x", "hvp A (r/r)", "hvp A (r/f)", "jvp of jvp"}
    assert max(len(line) for line in str(report).splitlines()) <= 100
    assert jax.config.jax_enable_x64 == before


def test_without_jax_the_column_is_absent(monkeypatch):
    for name in ("jax", "funclsq.jax"):
        monkeypatch.setitem(sys.modules, name, None)
    report = validate.cross_check(**CASES["tall"])
    assert report
    assert {row.candidate for row in report.rows} == {"torch"}
    assert {row.oracle for row in report.rows} == {"closed form", "differences", "mpmath"}
    assert any("JAX" in note for note in report.notes)


def test_a_null_space_cotangent():
    data = CASES["deficient"]
    null = np.linalg.svd(data["A"])[2][2:].T @ np.ones(3)
    report = validate.cross_check(
        **data,
        cotangent=null,
        oracles=["closed form", "mpmath"],
        candidates={"torch": validate.torch_candidate()},
    )
    assert report, str(report)
    report = validate.cross_check(
        **data, cotangent=null, oracles=FAST, candidates={"p": planted("v n^H", "dropped")}
    )
    assert failing(report) == {"vjp A"}


def test_gradients_on_fixed_rank_where_second_differences_are_dear(monkeypatch):
    monkeypatch.setattr("funclsq.validate.oracle_differences._SECOND", 0)
    report = validate.cross_check(
        **CASES["deficient"],
        oracles=["differences"],
        candidates={"torch": validate.torch_candidate()},
    )
    assert report, str(report)
    assert {"hvp A", "hvp A (r/r)", "hvp A (r/f)"} <= {row.quantity for row in report.rows}


@pytest.mark.parametrize("name", ["ash219", "abb313", "Maragal_1"])
def test_real_problems(data, name):
    folder = data / "sparse_lsq"
    A = scipy.io.mmread(folder / f"{name}.mtx.gz").astype(float)
    b = np.asarray(scipy.io.mmread(folder / f"{name}_b.mtx.gz"), float).ravel()
    rank = int(np.load(folder / f"{name}_ref.npz")["rank"])
    report = validate.cross_check(
        A, b, rank=rank, oracles=FAST, candidates={"t": validate.torch_candidate(rank=rank)}
    )
    assert report, str(report)


def test_large_problems_take_the_sparse_path(monkeypatch):
    monkeypatch.setattr("funclsq.validate.problem.DENSE_LIMIT", 100)
    rng = np.random.default_rng(0)
    A = scipy.sparse.random_array((40, 12), density=0.2, rng=rng) + scipy.sparse.eye_array(40, 12)
    candidates = {"torch": validate.torch_candidate(rank="full")}
    oracles = ["closed form", "differences"]
    report = validate.cross_check(A, rank="full", candidates=candidates, oracles=oracles)
    assert report, str(report)
    assert {row.oracle for row in report.rows} == set(oracles)
    assert any("A is large" in note for note in report.notes)
    report = validate.cross_check(
        A, rank="full", candidates={"p": planted("s z^H", "scaled")}, oracles=FAST
    )
    assert failing(report) == {"vjp A"}
    with pytest.raises(ValueError, match="too large to find its rank"):
        validate.cross_check(A, candidates=candidates)


def test_large_problems_without_full_rank_take_lsmr(monkeypatch):
    monkeypatch.setattr("funclsq.validate.problem.DENSE_LIMIT", 100)
    A = scipy.sparse.csr_array(np.kron(np.eye(4), data_of(6, 4, rank=2)["A"]))
    report = validate.cross_check(
        A, rank=8, oracles=FAST, candidates={"torch": validate.torch_candidate()}
    )
    assert report, str(report)


# --- the report ------------------------------------------------------------------------------


def test_report_is_a_table_a_truth_value_and_json():
    row = validate.Row("x", "torch", "svd", 1e-15, 1e-13, "100 eps")
    bad = validate.Row("vjp A", "torch", "svd", 1e-2, 1e-13, "100 eps")
    worse = validate.Row("vjp b", "torch", "svd", float("nan"), 1e-13, "NaN")
    assert validate.Report("good", (row,))
    assert not validate.Report("empty", ())
    report = validate.Report("bad", (row, bad, worse), ("a note",))
    assert not report
    assert [r.quantity for r in report.failures] == ["vjp b", "vjp A"]
    assert report.error("vjp A") == 1e-2
    with pytest.raises(KeyError):
        report.error("vjp c")
    lines = str(report).splitlines()
    assert lines[-1] == "FAILED: 2 of 3 comparisons"
    assert any(line.startswith("x ") and line.endswith("ok") for line in lines)
    assert any(line.startswith("vjp A ") and line.endswith("FAIL") for line in lines)
    content = json.loads(report.to_json())
    assert content["passed"] is False
    assert content["rows"][2]["error"] is None
    assert [r["passed"] for r in content["rows"]] == [True, False, False]


# --- errors ----------------------------------------------------------------------------------


def test_what_cannot_be_checked_is_refused():
    A, b = CASES["tall"]["A"], CASES["tall"]["b"]
    with pytest.raises(ValueError, match=r"b must have shape \(7,\)"):
        validate.cross_check(A, b[:-1])
    with pytest.raises(ValueError, match="one \\(m, n\\) matrix"):
        validate.cross_check(torch.zeros(2, 3, 2), b)
    with pytest.raises(ValueError, match="oracles are closed form"):
        validate.cross_check(A, b, oracles=["guess"])
    with pytest.raises(TypeError, match=r"validate\.compare"):
        validate.cross_check(fl.LinearOperator(lambda p, v: v, (3, 3)), b)
    with pytest.raises(TypeError, match="unknown argument 'atoll'"):
        validate.cross_check(A, b, candidates={}, atoll=1)


@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc", "bsr", "scipy", "Sparse"])
def test_every_layout_is_taken(layout):
    A = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4], [5, 0, 0, 6], [0, 7, 8, 0]]).double()
    b = torch.arange(4.0).double()
    made = {
        "coo": A.to_sparse,
        "uncoalesced": lambda: torch.sparse_coo_tensor(
            torch.cat([A.to_sparse().indices()] * 2, 1),
            torch.cat([A.to_sparse().values() / 2] * 2),
            check_invariants=True,
        ),
        "csr": A.to_sparse_csr,
        "csc": A.to_sparse_csc,
        "bsr": lambda: A.to_sparse_bsr((2, 2)),
        "scipy": lambda: scipy.sparse.csc_matrix(A.numpy()),
        "Sparse": lambda: fl.Sparse.from_torch(A.to_sparse()),
    }[layout]()
    problem = as_problem(made, b, None, None, None, "auto", np.random.default_rng(0))
    np.testing.assert_array_equal(problem.toarray(), A.numpy())
    assert not problem.dense
