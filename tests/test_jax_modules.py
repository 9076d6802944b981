"""Matrix-free operators in JAX, and the equinox modules."""

import functools

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax_common import assert_close, compiled, draw, full_pattern, loss

import funclsq as fl
import funclsq.jax as flj
from funclsq.jax import matrix_free

eqx = pytest.importorskip("equinox")


@pytest.fixture(autouse=True)
def _x64(x64):
    return x64


def matvec(p, v):
    return jnp.sin(p["A"]) @ v * p["scale"] * p["power"]


def dense(p):
    return jnp.sin(p["A"]) * p["scale"] * p["power"]


@pytest.mark.parametrize(
    ("name", "m", "n", "damp", "rank"),
    [("tall", 6, 3, 0.0, "full"), ("wide", 3, 5, 0.0, "auto"), ("damped", 4, 5, 0.3, "auto")],
)
def test_linear_operator_and_its_derivatives(name, m, n, damp, rank):
    rng = np.random.default_rng(0)
    p = {"A": draw(rng, m, n), "scale": jnp.asarray(1.3), "power": jnp.asarray(2)}
    args = (p["A"], draw(rng, m), jnp.asarray(rng.uniform(0.5, 2, m)), draw(rng, n))

    def ours(a, b, w, x0):
        A = flj.LinearOperator(matvec, (m, n), {**p, "A": a})
        return flj.lstsq(A, b, weights=w, x0=x0, damp=damp, rank=rank)

    def oracle(a, b, w, x0):
        s, A = jnp.sqrt(w)[:, None], dense({**p, "A": a})
        B = jnp.concatenate([s * A, damp * jnp.eye(n)])
        c = jnp.concatenate([s[:, 0] * (b - A @ x0), jnp.zeros(n)])
        return x0 + jnp.linalg.pinv(B) @ c

    def run(h):
        f = loss(h)
        g = jax.grad(f, (0, 1, 2, 3))
        d = jax.tree.map(lambda t: jnp.cos(3 * t), args)
        a, b, w, x0 = args
        batch = (jnp.stack([a, 2 * a]), jnp.stack([b, -b]), w, x0)
        out = {
            "wide": lambda: jax.jvp(g, args, d),
            "damped": lambda: jax.vmap(jax.grad(f), (0, 0, None, None))(*batch),
            "tall": lambda: (h(*args), g(*args), jax.jvp(h, args, d)[1]),
        }
        return compiled(out[name])()

    assert_close(run(ours), run(oracle))


def test_linear_operator_differentiates_what_its_function_closes_over():
    rng = np.random.default_rng(1)
    a, b = draw(rng, 6, 3), draw(rng, 6)

    def f(a, b):
        return flj.lstsq(flj.LinearOperator(lambda _, v: a @ v, (6, 3)), b).sum()

    want = jax.grad(lambda a: (jnp.linalg.pinv(a) @ b).sum())(a)
    assert_close(jax.grad(f)(a, b), want)
    assert_close(jax.jit(jax.vmap(jax.grad(f), (0, None)))(jnp.stack([a, a]), b)[1], want)


def test_linear_operator_sees_what_its_function_reads_change(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = draw(rng, 6, 3), draw(rng, 6)
    held = {"scale": 1.0}
    A = flj.LinearOperator(lambda _, v: held["scale"] * (a @ v), (6, 3))
    want = jnp.linalg.pinv(a) @ b
    made = []
    solve = matrix_free.Function.solve
    monkeypatch.setattr(matrix_free.Function, "solve", lambda *args: made.append(1) or solve(*args))
    for scale in (1.0, 2.0, 2.0 + 1e-9, jnp.linspace(1.0, 2.0, 6)[-1], jnp.full(6, 4.0), 2.0):
        held["scale"] = scale
        assert_close(flj.lstsq(A, b), want / jnp.mean(jnp.asarray(scale)), 1e-13)
    count = len(made)
    flj.lstsq(A, b)
    assert len(made) == count  # what was compiled is found again

    def f(scale):
        held["scale"] = scale
        return flj.lstsq(A, b).sum()

    assert_close(jax.grad(f)(1.0), -want.sum())


def test_linear_operator_complex_and_status():
    rng = np.random.default_rng(2)
    a, b = draw(rng, 5, 3, complex_=True), draw(rng, 5, 2, complex_=True)
    A = flj.LinearOperator(lambda p, v: p @ v, (5, 3), a)
    sol = flj.solve(A, b)
    assert_close(sol.x, jnp.linalg.pinv(a) @ b)
    assert bool(sol.converged.all())
    assert sol.solver == "lsmr"
    assert np.abs(sol.normal_residual_norm).max() < 1e-12
    short = flj.solve(A, b, maxiter=1)
    assert not bool(short.converged.any())
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER"):
        flj.lstsq(A, b, maxiter=1)
    short = jax.jit(lambda b: flj.lstsq(A, b, maxiter=1))
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER"):
        jax.block_until_ready((short(b), jax.effects_barrier()))
    with pytest.raises(fl.ConvergenceError):
        flj.lstsq(A, b, maxiter=1, on_failure="raise")
    assert flj.solve(A, b.at[0].set(jnp.nan)).status[0] == fl.Status.NONFINITE
    assert flj.lstsq(A, jnp.zeros((5, 0), complex)).shape == (3, 0)


def test_linear_operator_errors():
    with pytest.raises(TypeError, match="callable"):
        flj.LinearOperator(3, (2, 2))
    with pytest.raises(ValueError, match=r"must return shape \(4,\)"):
        flj.lstsq(flj.LinearOperator(lambda _, v: v, (4, 3)), jnp.ones(4))
    with pytest.raises(TypeError, match="must return that dtype"):
        flj.lstsq(flj.LinearOperator(lambda _, v: v.astype(jnp.float32), (3, 3)), jnp.ones(3))
    A = flj.LinearOperator(lambda _, v: v, (3, 3))
    with pytest.raises(ValueError, match="solver must be 'auto' or 'lsmr'"):
        flj.lstsq(A, jnp.ones(3), solver="qr")
    with pytest.raises(ValueError, match="backend is not supported"):
        flj.lstsq(A, jnp.ones(3), backend="superlu")


def test_least_squares_module():
    rng = np.random.default_rng(3)
    pattern = full_pattern(6, 3)
    values, b = draw(rng, 18), draw(rng, 6)
    layer = flj.LeastSquares(pattern, values, damp=0.3, weights=jnp.full(6, 2.0))
    want = flj.lstsq(values.reshape(6, 3), b, damp=0.3, weights=jnp.full(6, 2.0))
    assert_close(layer(b), want)
    grads = eqx.filter_grad(lambda layer: layer(b).sum())(layer)
    assert grads.A.values.shape == (18,)
    assert grads.log_weights.shape == (6,)
    assert np.isfinite(grads.log_damp)
    many = eqx.filter_jit(eqx.filter_vmap(layer))(jnp.stack([b, 2 * b]))
    assert_close(many[0], want)
    with pytest.raises(ValueError, match="positive"):
        flj.LeastSquares(pattern, values, damp=0.0)


def test_sparse_linear_module():
    pattern = fl.SparsityPattern([0, 1, 2, 2], [0, 1, 0, 1], (3, 2))
    layer = flj.SparseLinear(pattern, key=jax.random.key(0))
    x = jnp.asarray([1.0, -2.0])
    assert_close(layer(x), layer.A.todense() @ x)
    grads = eqx.filter_grad(lambda layer: layer(x).sum())(layer)
    assert_close(grads.A.values, x[jnp.asarray([0, 1, 0, 1])])
    assert_close(grads.bias, np.ones(3))


def test_training_recovers_a_sparse_operator():
    """Gauss-Newton-free: plain gradient descent through the solve finds the entries of A."""
    optax = pytest.importorskip("optax")
    rng = np.random.default_rng(4)
    pattern = fl.SparsityPattern([0, 1, 2, 3, 3, 4], [0, 1, 0, 1, 0, 1], (5, 2))
    true = jnp.asarray(rng.uniform(0.5, 1.5, 6))
    B = draw(rng, 5, 40)
    target = flj.lstsq(flj.Sparse(pattern, true), B)
    layer = flj.LeastSquares(pattern, true + 0.3 * draw(rng, 6))
    opt = optax.adam(2e-2)

    @eqx.filter_jit
    def fit(layer):
        state = opt.init(eqx.filter(layer, eqx.is_array))
        params, static = eqx.partition(layer, eqx.is_array)

        def step(carry, _):
            params, state = carry
            f = lambda p: ((eqx.combine(p, static)(B) - target) ** 2).mean()  # noqa: E731
            value, grads = jax.value_and_grad(f)(params)
            updates, state = opt.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        (params, _), values = jax.lax.scan(step, (params, state), None, length=400)
        return eqx.combine(params, static), values

    layer, values = fit(layer)
    assert values[-1] < 1e-4 * values[0]
    assert_close(layer.A.values, true, rtol=0.05)


class _Held:
    """Jitted with itself static, as is often done: what it holds is a constant of its program."""

    def __init__(self, a):
        self.a = a

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(self, v):
        return self.a @ v


@pytest.mark.parametrize("inner", ["method", "function"])
def test_what_an_inner_program_holds_is_seen_to_change(inner):
    held = {}

    def matvec(_, v):
        if inner == "method":
            return held["a"](v)
        a = held["a"].a
        return jax.jit(lambda u: a @ u)(v)

    A = flj.LinearOperator(matvec, (6, 3))
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((6, 3)), rng.standard_normal(6)
        held["a"] = _Held(jnp.asarray(a))
        expected = np.linalg.lstsq(a, b, rcond=None)[0]
        assert_close(flj.lstsq(A, b), expected, 1e-10)
        bar = jax.grad(lambda b: (flj.lstsq(A, b) ** 2).sum())(jnp.asarray(b))
        assert_close(bar, 2 * np.linalg.pinv(a).T @ expected, 1e-9)


def test_an_array_that_is_written_to_later_was_read_before():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((6, 3)), jnp.asarray(rng.standard_normal(6))
    held = {"a": a.copy()}
    A = flj.LinearOperator(lambda _, v: held["a"] @ v, (6, 3))
    x, pull = jax.vjp(lambda b: flj.lstsq(A, b), b)
    held["a"] *= 5
    held["a"] += 1
    assert_close(pull(x)[0], np.linalg.pinv(a).T @ np.asarray(x), 1e-9)
    held["a"] = a.copy()  # of the content that a program was kept for, which held the former
    assert_close(flj.lstsq(A, b), x, 1e-10)
    assert_close(jax.jacrev(lambda b: flj.lstsq(A, b))(b), np.linalg.pinv(a), 1e-9)
