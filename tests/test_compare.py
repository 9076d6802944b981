"""validate.compare: pairs of functions that a user believes to be equal."""

import functools

import pytest
import torch
from checked import CASES, failing

import funclsq as fl
from funclsq import validate


@pytest.fixture
def twins():
    jnp = pytest.importorskip("jax.numpy")

    def f(p, y, n):
        z = p["w"] @ y + p["c"]
        return {"sum": torch.tanh(z).sum(), "small": 1e-6 * (z * z.conj()), "count": n}

    def g(p, y, n, scale=1.0, wrap=lambda a: a):
        z = wrap(p["w"]) @ y + p["c"]
        return {"sum": jnp.tanh(z).sum(), "small": scale * 1e-6 * (z * z.conj()), "count": n}

    torch.manual_seed(0)
    w, c, y = torch.randn(3, 3).cdouble(), torch.randn(3).cdouble(), torch.randn(3).cdouble()
    w, c, y = w + 0.3j, c - 0.2j, y + 0.5j
    return f, g, ({"w": w, "c": c}, y.numpy(), torch.tensor([1, 2]))


def test_equal_functions_compare_equal(twins):
    import jax

    before = jax.config.jax_enable_x64
    f, g, args = twins
    report = validate.compare(f, g, *args)
    assert report, str(report)
    names = {row.quantity for row in report.rows}
    assert names >= {"value of ['sum']", "jvp args[1] of ['small']", "vjp args[0]['w']"}
    assert names >= {"hvp args[0]['c'] (r/r)", "vmap vjp args[1]", "vmap value of ['sum']"}
    assert jax.config.jax_enable_x64 == before


def test_compare_finds_planted_errors(twins):
    import jax

    f, g, args = twins
    scaled = functools.partial(g, scale=1.01)
    report = validate.compare(f, scaled, *args, batch=0)
    assert "value of ['small']" in failing(report)  # although it is small beside ['sum']
    assert "value of ['sum']" not in failing(report)
    assert not validate.compare(f, functools.partial(g, wrap=lambda a: a.conj()), *args, batch=0)

    def stopped(w):
        return w - 0.01 * (w - jax.lax.stop_gradient(w))

    report = validate.compare(f, functools.partial(g, wrap=stopped), *args, batch=2)
    assert "vjp args[0]['w']" in failing(report)
    assert "vmap vjp args[0]['w']" in failing(report)
    assert not {name for name in failing(report) if "value" in name}


def test_compare_says_what_differs_in_structure():
    jnp = pytest.importorskip("jax.numpy")
    x = torch.ones(3, dtype=torch.float64)
    cases = [
        (lambda t: t, lambda t: (t, t), "returned by"),
        (lambda t: t, lambda t: t[:2], "shape"),
        (lambda t: (t, torch.tensor(1)), lambda t: (t, jnp.array(2)), "differ"),
        (lambda t: t, lambda t: 1 / 0, "ZeroDivisionError"),
    ]
    for f, g, text in cases:
        report = validate.compare(f, g, x)
        assert not report
        assert text in str(report)
    with pytest.raises(ValueError, match="no argument can be differentiated"):
        validate.compare(torch.sin, jnp.sin, torch.arange(3))


def test_compare_on_funclsq_itself():
    pytest.importorskip("jax")
    import funclsq.jax as flj

    A, b = (torch.from_numpy(CASES["tall"][key]).float() for key in "Ab")
    report = validate.compare(fl.lstsq, flj.lstsq, A, b, batch=2)
    assert report, str(report)
