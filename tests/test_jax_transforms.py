"""funclsq.jax under JAX's control flow and transforms, against an SVD pseudo-inverse in JAX."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax_common import assert_close, compiled, draw, full_pattern, loss

import funclsq.jax as flj
from funclsq.raw import solver_calls

eqx = pytest.importorskip("equinox")

M, N = 6, 3


@pytest.fixture(autouse=True, scope="module")
def _x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def h_ours(v, b):
    return flj.lstsq(flj.Sparse(full_pattern(M, N), v), b)


def h_oracle(v, b):
    return jnp.linalg.pinv(v.reshape(M, N)) @ b


@pytest.fixture(scope="module")
def vb(_x64):
    rng = np.random.default_rng(0)
    return draw(rng, M * N), draw(rng, M)


def _scan(h, v, b):
    def step(c, _):
        g = jax.grad(loss(h))(c, b)
        return c - 0.01 * g, g.sum()

    return compiled(jax.grad(lambda v: jax.lax.scan(step, v, None, length=3)[0].sum()))(v)


def _while(h, v, b):
    def run(v):
        body = lambda s: (s[0] + 1, s[1] + 0.1 * h(s[1], b).sum())  # noqa: E731
        return jax.lax.while_loop(lambda s: s[0] < 3, body, (0, v))[1]

    return compiled(lambda v: jax.jvp(run, (v,), (jnp.cos(v),)))(v)


def _cond(h, v, b):
    def run(v, b):
        branch = lambda v: h(v, b)  # noqa: E731
        return jax.lax.cond(b[0] > 0, branch, lambda v: -2 * h(v, b), v).sum()

    return compiled(jax.vmap(jax.grad(run), (None, 0)))(v, jnp.stack([b, -b]))


def _remat(h, v, b):
    return compiled(jax.hessian(lambda b: loss(jax.checkpoint(h))(v, b)))(b)


def _linearize(h, v, b):
    push = jax.linearize(h, v, b)[1]
    return push(2 * v, b), push(jnp.cos(v), jnp.sin(b))


def _linear_transpose(h, v, b):
    return jax.linear_transpose(lambda b: h(v, b), b)(jnp.arange(1.0, N + 1))


def _equinox(h, v, b):
    f = lambda v: h(v, b).sum()  # noqa: E731
    return eqx.filter_jit(eqx.filter_grad(f))(v), eqx.filter_vmap(f)(jnp.stack([v, v + 1]))


def _aot(h, v, b):
    return jax.jit(h).lower(v, b).compile()(v, b)


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def _donate(h, v, b):
    return jax.jit(h, donate_argnums=(0, 1))(v + 0, b + 0)


def _disable_jit(h, v, b):
    with jax.disable_jit():
        return jax.grad(loss(h), (0, 1))(v, b)


def _debug_nans(h, v, b):
    with jax.debug_nans(True):
        return jax.jit(jax.grad(loss(h), (0, 1)))(v, b)


def _value_and_grad(h, v, b):
    return compiled(jax.value_and_grad(loss(h), (0, 1)))(v, b)


OTHERS = (_scan, _while, _cond, _remat, _linearize, _linear_transpose, _equinox, _aot, _donate,
          _disable_jit, _debug_nans, _value_and_grad)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Some donated buffers")
@pytest.mark.parametrize("transform", OTHERS, ids=lambda t: t.__name__.strip("_"))
def test_transform(transform, vb):
    assert_close(transform(h_ours, *vb), transform(h_oracle, *vb))


def test_every_nesting_of_vmap(vb):
    v, b = vb
    axes = [(0, None), (None, 0), (0, 0)]

    def run(h):
        out = {}
        for inner in axes:
            for outer in axes:
                V, B = v, b
                if inner[0] == 0:
                    V = jnp.stack([V, V + 0.3])
                if inner[1] == 0:
                    B = jnp.stack([B, B**2])
                if outer[0] == 0:
                    V = jnp.stack([V, V + 0.1, V - 0.1])
                if outer[1] == 0:
                    B = jnp.stack([B, B**3, B - 1])
                g = jax.vmap(jax.vmap(jax.grad(loss(h), (0, 1)), inner), outer)
                out[str((outer, inner))] = g(V, B)
        return out

    assert_close(compiled(lambda: run(h_ours))(), compiled(lambda: run(h_oracle))())


def test_vmap_over_b_is_one_solve(vb):
    v, b = vb
    B = jnp.stack([b * k for k in range(1, 17)])
    before = solver_calls()
    jax.vmap(h_ours, (None, 0))(v, B).block_until_ready()
    assert solver_calls() - before == 1
    before = solver_calls()
    jax.vmap(jax.grad(loss(h_ours)), (None, 0))(v, B).block_until_ready()
    assert solver_calls() - before == 2
