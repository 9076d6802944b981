"""What the tests of funclsq.jax share."""

import os

# Half the compilation time; the programs here are tiny. Read when JAX first compiles.
_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()

import jax
import jax.numpy as jnp
import numpy as np

import funclsq as fl

compiled = jax.jit


def full_pattern(m, n):
    return fl.SparsityPattern(*np.divmod(np.arange(m * n), n), (m, n))


def draw(rng, *shape, complex_=False):
    a = rng.standard_normal(shape)
    return jnp.asarray(a + 1j * rng.standard_normal(shape) if complex_ else a)


def problem(m=6, n=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    A, b = rng.standard_normal((m, n)), rng.standard_normal(m)
    return jnp.asarray(A.astype(dtype)), jnp.asarray(b.astype(dtype))


def loss(h):
    return lambda *args: jnp.sin(h(*args)).sum()


def assert_close(got, want, rtol=1e-9):
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [p for p, _ in got] == [p for p, _ in want]
    for (path, a), (_, b) in zip(got, want):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, path
        scale = max(float(np.abs(b).max(initial=0.0)), 1e-3)
        assert np.abs(a - b).max(initial=0.0) <= rtol * scale, jax.tree_util.keystr(path)
