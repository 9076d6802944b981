"""funclsq.jax under nested vmaps: right, and one solve where one is enough."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax_common import assert_close, compiled, draw, full_pattern, loss

import funclsq.jax as flj
from funclsq.raw import solver_calls

M, N = 6, 3

pytestmark = pytest.mark.usefixtures("x64_module")


def h_ours(v, b):
    return flj.lstsq(flj.Sparse(full_pattern(M, N), v), b)


def h_oracle(v, b):
    return jnp.linalg.pinv(v.reshape(M, N)) @ b


@pytest.fixture(scope="module")
def vb(x64_module):
    rng = np.random.default_rng(0)
    return draw(rng, M * N), draw(rng, M)


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
