"""funclsq's operator and solvers inside lineax and optimistix."""

import pytest

jax = pytest.importorskip("jax")
lx = pytest.importorskip("lineax")

import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse as jsparse
from jax_common import assert_close, compiled, draw, full_pattern

import funclsq as fl
import funclsq.jax as flj
import funclsq.jax.lineax as fll
from funclsq.jax.coloring import color_columns

M, N = 8, 4


@pytest.fixture(autouse=True)
def _x64(x64):
    return x64


@pytest.fixture
def tall(x64):
    rng = np.random.default_rng(0)
    mask = rng.random((M, N)) < 0.6
    mask[:N] |= np.eye(N, dtype=bool)
    pattern = fl.SparsityPattern(*np.nonzero(mask), (M, N))
    return pattern, draw(rng, pattern.nnz), draw(rng, M)


def to_dense(pattern, v):
    return jnp.zeros(pattern.shape, v.dtype).at[pattern.row, pattern.col].add(v)


SOLVERS = [fll.QR(), fll.LSMR(), fll.Cholesky(), fll.Cholesky(rank="full")]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{type(s).__name__}-{s.rank}")
def test_value_and_gradient_through_lineax(solver, tall):
    pattern, v, b = tall

    def ours(v, b):
        A = fll.SparseOperator(flj.Sparse(pattern, v))
        return jnp.sin(lx.linear_solve(A, b, solver).value).sum()

    def oracle(v, b):
        return jnp.sin(jnp.linalg.pinv(to_dense(pattern, v)) @ b).sum()

    run = lambda f: compiled(jax.value_and_grad(f, (0, 1)))(v, b)  # noqa: E731
    assert_close(run(ours), run(oracle))


def test_second_order_wide_and_rank_deficient_through_lineax():
    rng = np.random.default_rng(1)
    L, R, b = draw(rng, 4, 2), draw(rng, 2, 5), draw(rng, 4)
    pattern = full_pattern(4, 5)

    def run(solve):
        f = lambda L, b: jnp.sin(solve(L @ R, b)).sum()  # noqa: E731
        g = jax.grad(f, (0, 1))
        return compiled(lambda: (g(L, b), jax.jvp(g, (L, b), (jnp.cos(L), jnp.sin(b)))[1]))()

    def ours(A, b):
        A = fll.SparseOperator(flj.Sparse(pattern, A.reshape(-1)))
        return lx.linear_solve(A, b, fll.QR()).value

    assert_close(run(ours), run(lambda A, b: jnp.linalg.pinv(A, rtol=1e-10) @ b))


def test_vmap_and_state_reuse(tall):
    pattern, v, b = tall
    A = fll.SparseOperator(flj.Sparse(pattern, v))
    solver = fll.Cholesky()
    state = solver.init(A, {})
    B = jnp.stack([b, 2 * b, b**2])
    many = jax.vmap(lambda b: lx.linear_solve(A, b, solver, state=state).value)(B)
    assert_close(many, (jnp.linalg.pinv(to_dense(pattern, v)) @ B.T).T)
    transposed, _ = solver.transpose(state, {})
    assert transposed.A.shape == (N, M)
    x = lx.linear_solve(A.T, v[:N], solver).value
    assert_close(x, jnp.linalg.pinv(to_dense(pattern, v)).T @ v[:N])


def test_operator_from_bcoo_and_its_queries(tall):
    pattern, v, _ = tall
    dense = to_dense(pattern, v)
    for A in (jsparse.BCOO.fromdense(dense), jsparse.BCSR.fromdense(dense)):
        op = fll.SparseOperator(A)
        assert_close(op.as_matrix(), dense)
        assert_close(op.T.as_matrix(), dense.T)
        assert_close(op.mv(jnp.ones(N)), dense @ jnp.ones(N))
        assert not lx.is_symmetric(op)
        assert not lx.is_diagonal(op)
    complex_op = fll.SparseOperator(flj.Sparse(pattern, v * (1 + 2j)))
    assert_close(lx.conj(complex_op).as_matrix(), jnp.conj(dense * (1 + 2j)))
    band = flj.Sparse(fl.SparsityPattern([0, 1, 1], [0, 0, 1], (2, 2)), jnp.ones(3))
    assert lx.is_lower_triangular(fll.SparseOperator(band))
    assert lx.is_tridiagonal(fll.SparseOperator(band))
    assert not lx.is_upper_triangular(fll.SparseOperator(band))
    assert_close(lx.diagonal(fll.SparseOperator(band)), np.ones(2))


def _pytree_operator(pattern, v):
    dense = to_dense(pattern, v)

    def f(y):
        z = dense @ jnp.concatenate([y["a"], y["b"].reshape(-1)])
        return z[:3], z[3:]

    structure = jax.eval_shape(lambda: {"a": jnp.zeros(2), "b": jnp.zeros((1, 2))})
    return lx.FunctionLinearOperator(f, structure)


@pytest.mark.parametrize("given", [False, True])
def test_pytrees_as_vectors_and_colored_products(given, tall):
    pattern, v, b = tall
    solver = fll.Cholesky(pattern=pattern if given else None)
    sol = lx.linear_solve(_pytree_operator(pattern, v), (b[:3], b[3:]), solver)
    flat = jnp.concatenate([sol.value["a"], sol.value["b"].reshape(-1)])
    assert_close(flat, jnp.linalg.pinv(to_dense(pattern, v)) @ b)
    assert int(sol.stats["rank"]) == N


def test_entries_outside_the_given_pattern_are_noticed(tall):
    pattern, v, b = tall
    short = fl.SparsityPattern(pattern.row[1:], pattern.col[1:], pattern.shape)
    op = _pytree_operator(pattern, v)
    sol = lx.linear_solve(op, (b[:3], b[3:]), fll.Cholesky(pattern=short), throw=False)
    assert sol.result != lx.RESULTS.successful
    wrong = fl.SparsityPattern([0], [0], (3, 3))
    with pytest.raises(ValueError, match="shape of the operator"):
        lx.linear_solve(op, (b[:3], b[3:]), fll.Cholesky(pattern=wrong))
    twice = fl.SparsityPattern([0, 1, 0], [0, 1, 0], pattern.shape)
    with pytest.raises(ValueError, match="1 of its 3 positions are repeated"):
        fll.Cholesky(pattern=twice)


def test_failure_is_a_result(tall):
    pattern, v, b = tall
    A = fll.SparseOperator(flj.Sparse(pattern, v))
    sol = lx.linear_solve(A, b, fll.LSMR(maxiter=1), throw=False)
    assert sol.result == lx.RESULTS.max_steps_reached
    with pytest.raises(Exception, match="maximum number of"):
        lx.linear_solve(A, b, fll.LSMR(maxiter=1)).value.block_until_ready()


def test_colors_of_a_band_matrix():
    n = 30
    row = np.concatenate([np.arange(n), np.arange(n - 1)])
    col = np.concatenate([np.arange(n), np.arange(1, n)])
    colors = color_columns(fl.SparsityPattern(row, col, (n, n)))
    assert colors.max() + 1 == 2


def _rosenbrock(size):
    row, col = [], []
    for i in range(size - 1):
        row += [i, i, size - 1 + i]
        col += [i, i + 1, i]
    pattern = fl.SparsityPattern(row, col, (2 * size - 2, size))
    return pattern, lambda y, _: jnp.concatenate([10 * (y[1:] - y[:-1] ** 2), 1 - y[:-1]])


@pytest.mark.parametrize("name", ["GaussNewton", "LevenbergMarquardt"])
@pytest.mark.parametrize("sparse", [False, True])
def test_optimistix(name, sparse):
    optx = pytest.importorskip("optimistix")
    pattern, residuals = _rosenbrock(12)
    solver = fll.Cholesky(pattern=pattern) if sparse else fll.QR()
    method = getattr(optx, name)(1e-10, 1e-10, linear_solver=solver)
    sol = optx.least_squares(residuals, method, jnp.full(12, 0.9), max_steps=200)
    assert_close(sol.value, np.ones(12))
