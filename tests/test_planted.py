"""Every planted error is found, and where it is."""

import functools

import pytest
import torch
from checked import CASES, FAST, data_of, failing
from planted import CHANGES, OUTER, REALS, TANGENTS, VECTORS, planted

import funclsq as fl
from funclsq import derivatives, validate

SQUARE = data_of(6, 6, rank=3, kind=complex, weights=True, x0=True)
DAMPED = data_of(6, 6, kind=complex, weights=True, x0=True, damp=0.4)
MUTANTS = [
    *((SQUARE, term, change) for term in OUTER for change in CHANGES),
    *((DAMPED, t, c) for t in ("s z^H", "u y^H") for c in CHANGES),
    *((SQUARE, t, c) for t in VECTORS for c in CHANGES if c != "transposed"),
    *((DAMPED, t, c) for t in REALS for c in ("dropped", "flipped", "scaled")),
    *((SQUARE, t, c) for t in TANGENTS for c in CHANGES if c != "transposed"),
]


@pytest.mark.parametrize("data", [SQUARE, DAMPED], ids=["deficient", "damped"])
def test_the_rule_without_errors_passes(data):
    report = validate.cross_check(**data, candidates={"rule": planted()}, oracles=FAST)
    assert report, str(report)


@pytest.mark.parametrize(
    ("data", "term", "change"),
    MUTANTS,
    ids=[f"{'damped ' if d is DAMPED else ''}{t} {c}" for d, t, c in MUTANTS],
)
def test_planted_errors_are_found_where_they_are(data, term, change):
    report = validate.cross_check(**data, candidates={"rule": planted(term, change)}, oracles=FAST)
    expected = (OUTER | VECTORS | REALS | TANGENTS)[term]
    assert not report
    assert failing(report) == expected & {row.quantity for row in report.rows}
    assert f"{min(failing(report))} of rule" in str(report)


@pytest.mark.parametrize("oracle", ["closed form", "differences", "mpmath", "autodiff"])
def test_every_oracle_finds_one_percent(oracle):
    if oracle == "autodiff":
        pytest.importorskip("jax")
    report = validate.cross_check(
        **CASES["tall"], candidates={"rule": planted("s z^H", "scaled")}, oracles=[oracle]
    )
    assert failing(report) == {"vjp A"}
    assert {row.oracle for row in report.failures} == {oracle}


def _pulled(monkeypatch, change):
    pull = derivatives._pull

    def mutant(*args):
        w, d2, c, g, gate, *params = pull(*args)
        return change(w, d2, c, g, gate, params)

    monkeypatch.setattr(derivatives, "_pull", mutant)


REAL_MUTANTS = {
    "A_bar scaled": (
        lambda w, d2, c, g, t, p: (w, d2, c, g, t, *(1.01 * a for a in p)),
        {"vjp A", "hvp A", "hvp A (r/r)"},
    ),
    "A_bar without conjugate": (
        lambda w, d2, c, g, t, p: (w, d2, c, g, t, *(a.conj() for a in p)),
        {"vjp A", "hvp A", "hvp A (r/r)"},
    ),
    "A_bar transposed": (
        lambda w, d2, c, g, t, p: (w, d2, c, g, t, *(a.mT for a in p)),
        {"vjp A", "hvp A", "hvp A (r/r)"},
    ),
    "b_bar flipped": (
        lambda w, d2, c, g, t, p: (w, d2, None if c is None else -c, g, t, *p),
        {"vjp b", "hvp b", "hvp b (r/r)"},
    ),
    "damp_bar dropped": (
        lambda w, d2, c, g, t, p: (w, None if d2 is None else 0 * d2, c, g, t, *p),
        {"vjp damp", "hvp damp", "hvp damp (r/r)"},
    ),
}


@pytest.mark.parametrize("name", REAL_MUTANTS)
def test_errors_planted_in_funclsq_itself_are_found(monkeypatch, name):
    change, expected = REAL_MUTANTS[name]
    check = functools.partial(
        validate.cross_check,
        **DAMPED,
        oracles=FAST,
        candidates={"torch": validate.torch_candidate()},
    )
    assert check()
    _pulled(monkeypatch, change)
    report = check()
    assert failing(report) >= expected
    assert not failing(report) & {"x", "jvp A", "jvp b", "jvp damp", "jvp of jvp"}


def test_a_tangent_error_planted_in_funclsq_is_found(monkeypatch):
    push = derivatives._push

    def mutant(*args):
        x_dot, ax_dot = push(*args)
        return (None, None) if x_dot is None else (1.01 * x_dot, ax_dot)

    monkeypatch.setattr(derivatives, "_push", mutant)
    report = validate.cross_check(
        **CASES["tall"], oracles=FAST, candidates={"torch": validate.torch_candidate()}
    )
    assert failing(report) >= {"jvp A", "jvp b", "jvp of jvp"}
    assert not failing(report) & {"x", "vjp A", "vjp b"}


def test_an_error_on_the_jax_side_is_found_there():
    jax = pytest.importorskip("jax")
    import funclsq.jax as flj

    def mutant(A, b):
        stopped = jax.lax.stop_gradient(A)
        return flj.lstsq(A + 0.01 * (A - stopped), b)  # the derivative in A is 1% too large

    report = validate.cross_check(
        **CASES["tall"],
        oracles=FAST,
        candidates={"torch": validate.torch_candidate(), "jax": validate.jax_candidate(mutant)},
    )
    assert {row.candidate for row in report.failures} == {"jax"}
    assert {row.oracle for row in report.failures} == {"closed form", "torch"}
    assert failing(report) >= {"vjp A", "jvp A", "hvp A"}
    assert not failing(report) & {"x", "vjp b", "jvp b"}


def test_what_a_candidate_raises_or_misshapes_is_a_finding():
    def raises(A, b):
        raise RuntimeError("no such luck")

    def misshapes(A, b):
        return fl.lstsq(A, b)[:-1]

    def breaks(A, b):
        return fl.lstsq(A, b) * torch.nan

    for function, text in ((raises, "no such luck"), (misshapes, "shape"), (breaks, "not finite")):
        report = validate.cross_check(
            **CASES["tall"], oracles=FAST, candidates={"f": validate.torch_candidate(function)}
        )
        assert not report
        assert text in str(report)
        assert "x" in failing(report)
