"""Sparse formats in JAX: repeated and unsorted entries, padding, traced indices, products."""

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse
from jax_common import assert_close, compiled, draw, loss

import funclsq as fl
import funclsq.jax as flj

eqx = pytest.importorskip("equinox")

pytestmark = pytest.mark.usefixtures("x64_module")


@pytest.fixture(scope="module")
def entries(x64_module):
    rng = np.random.default_rng(3)
    m, n = 7, 4
    row, col = np.nonzero(rng.random((m, n)) < 0.6)
    order = rng.permutation(row.size)
    row, col = np.append(row[order], row[0]), np.append(col[order], col[0])
    return (m, n), row, col, draw(rng, row.size), draw(rng, m, 2)


def _formats(entries):
    (m, n), row, col, *_ = entries
    index = jnp.asarray(np.stack([row, col], 1))
    padded = jnp.concatenate([index, jnp.array([[m, n], [m, 0], [0, n]])])
    pattern = fl.SparsityPattern(row, col, (m, n))
    junk = jnp.array([jnp.nan, 3.0, 4.0])

    def bcoo(index):
        def build(v):
            v = v if index.shape[0] == v.size else jnp.concatenate([v, junk])
            return jsparse.BCOO((v, index), shape=(m, n))

        return build

    return {
        "Sparse": lambda v: flj.Sparse(pattern, v),
        "BCOO": bcoo(index),
        "BCOO padded": bcoo(padded),
        "traced": (index, bcoo),
        "traced padded": (padded, bcoo),
        "dense": lambda v: jnp.zeros((m, n), v.dtype).at[row, col].add(v),
    }


def _sparse_transforms(build, v, b):
    h = lambda v, b: flj.lstsq(build(v), b, damp=0.1)  # noqa: E731
    f = loss(h)
    V, B = jnp.stack([v, v**2]), jnp.stack([b, 2 * b, b**2])
    g = jax.grad(f, (0, 1))
    return {
        "value": h(v, b),
        "grad": g(v, b),
        "hessian": jax.hessian(f)(v, b),
        "values then b": jax.vmap(jax.vmap(g, (None, 0)), (0, None))(V, B),
        "b then values": jax.vmap(jax.vmap(g, (0, None)), (None, 0))(V, B),
    }


@pytest.mark.parametrize("kind", ["Sparse", "BCOO padded", "traced", "traced padded"])
def test_sparse_formats(kind, entries):
    *_, v, b = entries
    formats = _formats(entries)
    want = compiled(lambda v, b: _sparse_transforms(formats["dense"], v, b))(v, b)
    if kind.startswith("traced"):
        index, bcoo = formats[kind]
        got = compiled(lambda i, v, b: _sparse_transforms(bcoo(i), v, b))(index, v, b)
    else:
        got = compiled(lambda v, b: _sparse_transforms(formats[kind], v, b))(v, b)
    assert_close(got, want)


def test_sparse_grad_and_filter_grad_of_bcoo(entries):
    *_, v, b = entries
    formats = _formats(entries)
    f = lambda A: jnp.sin(flj.lstsq(A, b, damp=0.1)).sum()  # noqa: E731
    want = jax.grad(lambda v: f(formats["dense"](v)))(v)
    A = formats["BCOO"](v)
    assert_close(jsparse.grad(f)(A).data, want)
    assert_close(eqx.filter_grad(f)(A).data, want)
    assert_close(jax.grad(f)(formats["Sparse"](v)).values, want)


def test_bcsr_concrete_traced_and_padded(entries):
    *_, v, b = entries
    dense = _formats(entries)["dense"](v)
    want = flj.lstsq(dense, b, damp=0.1)
    A = jsparse.BCSR.fromdense(dense)
    n = A.shape[1]
    longer = (jnp.append(A.data, 9.0), jnp.append(A.indices, n), A.indptr)
    for B in (A, jsparse.BCSR(longer, shape=A.shape)):
        assert_close(flj.lstsq(B, b, damp=0.1), want)
        assert_close(jax.jit(lambda A, b: flj.lstsq(A, b, damp=0.1))(B, b), want)


def test_vmap_over_bcoo_with_other_indices_for_each_member(entries):
    (m, n), row, col, v, b = entries
    index = jnp.asarray(np.stack([row, col], 1))
    both = jsparse.BCOO((jnp.stack([v, v]), jnp.stack([index, index[::-1]])), shape=(2, m, n))
    got = jax.vmap(lambda A: flj.lstsq(A, b, damp=0.1))(both)
    dense = _formats(entries)["dense"]
    want = jnp.stack([flj.lstsq(dense(u), b, damp=0.1) for u in (v, v[::-1])])
    assert_close(got, want)
    sol = jax.vmap(lambda A: flj.solve(A, b, damp=0.1))(both)
    assert_close(sol.x, want)
    alone = [flj.solve(dense(u), b, damp=0.1).residual_norm for u in (v, v[::-1])]
    assert_close(sol.residual_norm, jnp.stack(alone))


def test_sparse_products_in_every_direction(entries):
    (m, n), row, col, v, _ = entries
    rng = np.random.default_rng(1)
    pattern = fl.SparsityPattern(row, col, (m, n))
    z = v + 1j * draw(rng, v.size)
    x, y = draw(rng, n, complex_=True), draw(rng, m, 2, complex_=True)

    def run(build):
        def f(z, x, y):
            A = build(z)
            Ax, Ay = A @ x, (A.rmatvec(y) if hasattr(A, "rmatvec") else A.conj().T @ y)
            return jnp.abs(jnp.sin(Ax)).sum() + jnp.abs(Ay**2).sum()

        g = jax.grad(f, (0, 1, 2))
        d = (jnp.cos(z), jnp.sin(x), jnp.cos(y))
        many = jnp.stack([z, 2 * z])
        return jax.jit(
            lambda: (
                g(z, x, y),
                jax.jvp(g, (z, x, y), d)[1],
                jax.vmap(g, (0, None, None))(many, x, y),
            )
        )()

    dense = lambda v: jnp.zeros((m, n), v.dtype).at[row, col].add(v)  # noqa: E731
    assert_close(run(lambda v: flj.Sparse(pattern, v)), run(dense))
