"""Derivatives of funclsq.jax up to second order, against autodiff of an SVD pseudo-inverse in JAX.

Where A is rank deficient it is written as a product L R, so that every direction keeps its rank.
"""

import dataclasses

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad
from jax_common import assert_close, compiled, draw, full_pattern

import funclsq.jax as flj
from funclsq.jax.primitive import solve_p

pytestmark = pytest.mark.usefixtures("x64_module")


CASES = {
    "tall": {"m": 6, "n": 3},
    "wide": {"m": 3, "n": 5},
    "rank-deficient": {"m": 6, "n": 4, "r": 2, "x0": True, "w": True},
    "damped": {"m": 3, "n": 4, "damp": True, "x0": True},
    "weighted": {"m": 6, "n": 3, "w": True},
    "complex": {"m": 5, "n": 4, "r": 3, "w": True, "complex_": True},
}


def make(m, n, r=None, w=False, x0=False, damp=False, complex_=False):
    rng = np.random.default_rng(m + 10 * n)
    z = {"complex_": complex_}
    v = {"b": draw(rng, m, **z)}
    if r is None:
        v["A"] = draw(rng, m, n, **z)
    else:
        v["L"], v["R"] = draw(rng, m, r, **z), draw(rng, r, n, **z)
    if w:
        v["w"] = jnp.asarray(rng.uniform(0.5, 2.0, m))
    if x0:
        v["x0"] = draw(rng, n, **z)
    if damp:
        v["damp"] = jnp.asarray(0.7)
    return v


def matrix(v):
    return v["A"] if "A" in v else v["L"] @ v["R"]


def ours(v, **options):
    A = matrix(v)
    A = flj.Sparse(full_pattern(*A.shape), A.reshape(-1))
    damp = v.get("damp", 0.0)
    return flj.lstsq(A, v["b"], damp=damp, weights=v.get("w"), x0=v.get("x0"), **options)


def ours_dense(v, **options):
    damp = v.get("damp", 0.0)
    return flj.lstsq(matrix(v), v["b"], damp=damp, weights=v.get("w"), x0=v.get("x0"), **options)


def oracle(v):
    A, b = matrix(v), v["b"]
    n = A.shape[1]
    x0 = v.get("x0", jnp.zeros(n, A.dtype))
    c = b - A @ x0
    if "w" in v:
        s = jnp.sqrt(v["w"])
        A, c = s[:, None] * A, s * c
    if "damp" in v:
        A = jnp.concatenate([A, v["damp"] * jnp.eye(n)])
        c = jnp.concatenate([c, jnp.zeros(n)])
    return x0 + jnp.linalg.pinv(A, rtol=1e-10) @ c


def scalar(h):
    def f(v):
        x = h(v)
        t = jnp.arange(1.0, x.size + 1)
        return (t * jnp.real(jnp.sin(x))).sum() + (jnp.abs(x) ** 2 * jnp.cos(t)).sum()

    return f


def direction(v, k):
    return jax.tree.map(lambda a: jnp.cos(jnp.abs(a) * 3 + k).astype(a.dtype) + 0.3 * a, v)


def stacked(v):
    return jax.tree.map(lambda a: jnp.stack([a, 1.5 * a]), v)


def derivatives(h):
    f = scalar(h)
    grad = jax.grad(f)

    def run(v):
        d, e = direction(v, 1.0), direction(v, 2.0)
        return {
            "value": h(v),
            "grad": grad(v),
            "jvp": jax.jvp(h, (v,), (d,))[1],
            "forward over reverse": jax.jvp(grad, (v,), (d,))[1],
            "reverse over forward": jax.grad(lambda v: jax.jvp(f, (v,), (d,))[1])(v),
            "reverse over reverse": jax.grad(
                lambda v: sum(jnp.sum(jnp.abs(t) ** 2) for t in jax.tree.leaves(grad(v)))
            )(v),
            "forward over forward": jax.jvp(lambda u: jax.jvp(f, (u,), (d,))[1], (v,), (e,))[1],
            "vmap of grad": jax.vmap(grad)(stacked(v)),
            "vmap over b of grad": jax.vmap(lambda b: grad({**v, "b": b}))(
                jnp.stack([v["b"], v["b"] ** 2, 2 * v["b"]])
            ),
        }

    return compiled(run)


@pytest.mark.parametrize("name", CASES)
def test_every_derivative_up_to_second_order(name):
    v = make(**CASES[name])
    h = ours_dense if name == "tall" else ours
    assert_close(derivatives(h)(v), derivatives(oracle)(v))


def test_full_hessian_and_jacobians():
    v = make(4, 2)

    def run(h):
        f = scalar(h)
        return jax.jit(
            lambda v: (
                jax.hessian(f)(v),
                jax.jacfwd(h)(v),
                jax.jacrev(h)(v),
                jax.jacfwd(jax.jacfwd(f))(v),
            )
        )(v)

    assert_close(run(ours), run(oracle))


@pytest.mark.parametrize("mutant", ["scaled", "no third term", "sign", "no conjugate"])
def test_a_wrong_rule_would_be_noticed(mutant, monkeypatch):
    """The comparison above fails for a tangent rule with a planted error."""
    right = ad.primitive_jvps[solve_p]

    def wrong(primals, tangents, *, problem, has):
        if mutant == "no third term":
            problem = dataclasses.replace(problem, full_rank=True)
        out, dots = right(primals, tangents, problem=problem, has=has)
        if isinstance(dots[0], ad.Zero) or mutant == "no third term":
            return out, dots
        change = {"scaled": lambda t: 1.01 * t, "sign": lambda t: -t, "no conjugate": jnp.conj}
        return out, [change[mutant](dots[0]), *dots[1:]]

    monkeypatch.setitem(ad.primitive_jvps, solve_p, wrong)
    v = make(**CASES["complex"])
    d = direction(v, 1.0)
    unique = 1000 + len(mutant)  # a program of its own: nothing compiled before is used
    got = jax.jvp(lambda v: ours(v, maxiter=unique), (v,), (d,))[1]
    want = jax.jvp(oracle, (v,), (d,))[1]
    with pytest.raises(AssertionError):
        assert_close(got, want)
