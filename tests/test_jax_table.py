"""Every transform on every kind of matrix and problem, against an SVD pseudo-inverse in JAX.

One table: rows are transforms, columns kinds of matrix (dense, BCOO, BCSR, Sparse), and each cell
is tried on tall, wide, rank-deficient and damped problems. BCOO and BCSR go through ``jit`` as
arguments, so their indices are tracers. A rank-deficient A is a product L R with L the variable,
so that every direction keeps the rank.
"""

import functools

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse
from jax_common import assert_close, draw, full_pattern

import funclsq.jax as flj

eqx = pytest.importorskip("equinox")

pytestmark = pytest.mark.usefixtures("x64_module")


PROBLEMS = {
    "tall": (5, 3, None, 0.0),
    "wide": (3, 4, None, 0.0),
    "rank-deficient": (5, 3, 2, 0.0),
    "damped": (3, 4, None, 0.6),
}
KINDS = ("dense", "BCOO", "BCSR", "Sparse")


def variables(problem):
    """Entries of A, or of its left factor, and b; what makes A of them."""
    m, n, rank, _ = PROBLEMS[problem]
    rng = np.random.default_rng(len(problem))
    b = draw(rng, m)
    if rank is None:
        return draw(rng, m, n), b, lambda v: v
    R = draw(rng, rank, n)
    return draw(rng, m, rank), b, lambda v: v @ R


def container(kind, m, n):
    """A matrix of ones of this kind: what a user would pass through ``jit``."""
    ones = jnp.ones((m, n))
    if kind == "dense":
        return ones
    if kind == "Sparse":
        return flj.Sparse(full_pattern(m, n), ones.reshape(-1))
    return getattr(jsparse, kind).fromdense(ones)


def filled(A, entries):
    """The container with these entries; its indices stay what they are, tracers under ``jit``."""
    if isinstance(A, jsparse.BCOO):
        return jsparse.BCOO((entries.reshape(-1), A.indices), shape=A.shape)
    if isinstance(A, jsparse.BCSR):
        return jsparse.BCSR((entries.reshape(-1), A.indices, A.indptr), shape=A.shape)
    if isinstance(A, flj.Sparse):
        return flj.Sparse(A.pattern, entries.reshape(-1))
    return entries


def ours(problem, A):
    """The solution as a function of (v, b)."""
    _, _, make = variables(problem)
    damp = PROBLEMS[problem][3]
    return lambda v, b: flj.lstsq(filled(A, make(v)), b, damp=damp)


def oracle(problem):
    """The same by an SVD."""
    _, _, make = variables(problem)
    n, damp = PROBLEMS[problem][1], PROBLEMS[problem][3]

    def x(v, b):
        A = jnp.concatenate([make(v), damp * jnp.eye(n)]) if damp else make(v)
        return jnp.linalg.pinv(A, rtol=1e-10) @ jnp.concatenate([b, jnp.zeros(len(A) - len(b))])

    return x


def scalar(h):
    return lambda v, b: (jnp.sin(h(v, b)) * jnp.arange(1.0, h(v, b).size + 1)).sum()


def direction(v, b):
    return jnp.cos(3 * v), jnp.sin(2 * b)


# The rows. Each takes a function (v, b) -> x and where to evaluate.


def _grad(h, v, b):
    return jax.grad(scalar(h), (0, 1))(v, b)


def _value_and_grad(h, v, b):
    return jax.value_and_grad(scalar(h))(v, b)


def _vjp(h, v, b):
    x, pull = jax.vjp(h, v, b)
    return pull(jnp.cos(x))


def _jvp(h, v, b):
    return jax.jvp(h, (v, b), direction(v, b))


def _linearize(h, v, b):
    push = jax.linearize(h, v, b)[1]
    return push(*direction(v, b)), push(v, jnp.zeros_like(b))


def _linear_transpose(h, v, b):
    return jax.linear_transpose(lambda b: h(v, b), b)(jnp.arange(1.0, h(v, b).size + 1))


def _jacobians(h, v, b):
    return jax.jacfwd(h, 1)(v, b), jax.jacrev(h, 1)(v, b)


def _hessian(h, v, b):
    return jax.hessian(scalar(h), 1)(v, b)


def _reverse_over_reverse(h, v, b):
    return jax.grad(lambda v: (jax.grad(scalar(h))(v, b) ** 2).sum())(v)


def _forward_over_forward(h, v, b):
    first = lambda v, b: jax.jvp(h, (v, b), direction(v, b))[1]  # noqa: E731
    return jax.jvp(first, (v, b), (v, b))[1]


def _vmap(h, v, b):
    V, B = jnp.stack([v, 2 * v]), jnp.stack([b, jnp.cos(b)])
    g = jax.grad(scalar(h), (0, 1))
    return jax.vmap(g)(V, B), jax.vmap(g, (0, None))(V, b), jax.vmap(g, (None, 0))(v, B)


def _nested_vmap(h, v, b):
    V, B = jnp.stack([v, 2 * v]), jnp.stack([b, jnp.cos(b), 2 * b], 1)
    g = jax.grad(scalar(h))
    both = jax.vmap(jax.vmap(g, (None, 1)), (0, None))(V, B)
    return both, jax.vmap(jax.vmap(g, (0, None)), (None, 1))(V, B)


def _scan(h, v, b):
    step = lambda c, _: (c - 0.01 * jax.grad(scalar(h))(c, b), c.sum())  # noqa: E731
    return jax.grad(lambda v: jax.lax.scan(step, v, None, length=2)[0].sum())(v)


def _while_loop(h, v, b):
    def run(v):
        body = lambda s: (s[0] + 1, s[1] * (1 + 0.1 * h(s[1], b).sum()))  # noqa: E731
        return jax.lax.while_loop(lambda s: s[0] < 2, body, (0, v))[1]

    return jax.jvp(run, (v,), (v,))


def _cond(h, v, b):
    run = lambda v, b: jax.lax.cond(b[0] > 0, h, lambda v, b: -2 * h(v, b), v, b).sum()  # noqa: E731
    return jax.vmap(jax.grad(run), (None, 0))(v, jnp.stack([b, -b]))


def _remat(h, v, b):
    return jax.grad(scalar(jax.checkpoint(h)), (0, 1))(v, b)


INSIDE = (_grad, _value_and_grad, _vjp, _jvp, _linearize, _linear_transpose, _jacobians, _hessian,
          _reverse_over_reverse, _forward_over_forward, _vmap, _nested_vmap, _scan, _while_loop,
          _cond, _remat)  # fmt: skip
CORE = (_grad, _jvp, _linear_transpose, _reverse_over_reverse, _vmap)


def column(rows, h, v, b):
    """Rows that work inside one compiled program."""
    return {row.__name__.strip("_"): row(h, v, b) for row in rows}


@functools.lru_cache
def wanted(problem):
    v, b, _ = variables(problem)
    return jax.jit(lambda v, b: column(INSIDE, oracle(problem), v, b))(v, b)


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_transform_inside_jit(kind, problem):
    """Every row; for traced indices, which take long to compile, all on one problem only."""
    rows = INSIDE if kind in ("dense", "Sparse") or problem == "tall" else CORE
    v, b, _ = variables(problem)
    A = container(kind, *PROBLEMS[problem][:2])
    got = jax.jit(lambda A, v, b: column(rows, ours(problem, A), v, b))(A, v, b)
    want = {name: wanted(problem)[name] for name in got}
    assert_close(got, want, rtol=1e-8)


# Rows that are about how a program is compiled or called: on gradients in both operands.


def _filter(A, problem, v, b):
    h = ours(problem, A)
    both = eqx.filter_grad(lambda vb: scalar(h)(*vb))
    single = eqx.filter_jit(both)((v, b))
    many = eqx.filter_vmap(both)((jnp.stack([v, v]), jnp.stack([b, b])))
    assert_close(jax.tree.map(lambda t: t[1], many), single)
    return single


def _filter_grad_of_the_matrix(A, problem, v, b):
    """The gradient in A itself, whatever leaves it has."""
    damp = PROBLEMS[problem][3]
    m, n = PROBLEMS[problem][:2]
    f = lambda A: jnp.sin(flj.lstsq(A, b, damp=damp)).sum()  # noqa: E731
    got = eqx.filter_jit(eqx.filter_grad(f))(filled(A, v))
    entries = {"BCOO": "data", "BCSR": "data", "Sparse": "values"}.get(type(A).__name__)
    got = got if entries is None else getattr(got, entries)
    want = jax.grad(lambda v: jnp.sin(oracle(problem)(v, b)).sum())(v)
    assert_close(got.reshape(m, n), want, rtol=1e-8)
    return jax.grad(scalar(ours(problem, A)), (0, 1))(v, b)


def _sparse_grad(A, problem, v, b):
    if isinstance(A, jsparse.JAXSparse):
        f = lambda A: jnp.sin(flj.lstsq(A, b, damp=PROBLEMS[problem][3])).sum()  # noqa: E731
        got = jsparse.grad(f)(filled(A, v))
        want = jax.grad(lambda v: jnp.sin(oracle(problem)(v, b)).sum())(v)
        assert_close(got.data.reshape(v.shape), want, rtol=1e-8)
    return jax.grad(scalar(ours(problem, A)), (0, 1))(v, b)


def _ahead_of_time(A, problem, v, b):
    g = jax.jit(lambda A, v, b: jax.grad(scalar(ours(problem, A)), (0, 1))(v, b))
    return g.lower(A, v, b).compile()(A, v, b)


def _donated(A, problem, v, b):
    g = jax.jit(
        lambda A, v, b: jax.grad(scalar(ours(problem, A)), (0, 1))(v, b), donate_argnums=(1, 2)
    )
    return g(A, v + 0, b + 0)


def _disable_jit(A, problem, v, b):
    with jax.disable_jit():
        return jax.grad(scalar(ours(problem, A)), (0, 1))(v, b)


def _debug_nans(A, problem, v, b):
    with jax.debug_nans(True):
        return jax.jit(lambda A, v, b: jax.grad(scalar(ours(problem, A)), (0, 1))(v, b))(A, v, b)


OUTSIDE = (_filter, _filter_grad_of_the_matrix, _sparse_grad, _ahead_of_time, _donated,
           _disable_jit, _debug_nans)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", OUTSIDE, ids=lambda t: t.__name__.strip("_"))
def test_every_way_to_compile_and_call(row, kind):
    problem = {"dense": "damped", "BCOO": "tall", "BCSR": "wide", "Sparse": "tall"}[kind]
    v, b, _ = variables(problem)
    got = row(container(kind, *PROBLEMS[problem][:2]), problem, v, b)
    assert_close(got, jax.jit(jax.grad(scalar(oracle(problem)), (0, 1)))(v, b), rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hessian_in_the_entries(kind):
    """Full second derivatives in A and b, every entry, against a dense reference."""
    v, b, _ = variables("tall")
    A = container(kind, 5, 3)
    got = jax.jit(lambda A, v, b: jax.hessian(scalar(ours("tall", A)), (0, 1))(v, b))(A, v, b)
    assert_close(got, jax.jit(jax.hessian(scalar(oracle("tall")), (0, 1)))(v, b), rtol=1e-8)
