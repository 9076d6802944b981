"""What lineax expects of any solver: values, states, results, derivatives, on its own operators."""

import itertools

import pytest

jax = pytest.importorskip("jax")
lx = pytest.importorskip("lineax")

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax_common import assert_close, draw, full_pattern

import funclsq as fl
import funclsq.jax as flj
import funclsq.jax.lineax as fll


@pytest.fixture(autouse=True)
def _x64(x64):
    return x64


SHAPES = {
    "well posed": (5, 5, None),
    "tall": (7, 4, None),
    "wide": (4, 7, None),
    "deficient": (6, 5, 3),
    "deficient wide": (4, 6, 2),
}
SOLVERS = {
    "cholesky": lambda _: fll.Cholesky(),
    "qr": lambda _: fll.QR(),
    "svd": lambda _: fll.SVD(),
    "lsmr": lambda _: fll.LSMR(),
    "colours": lambda M: fll.Cholesky(pattern=full_pattern(*M.shape)),
}


def matrix(shape, complex_=False, seed=0):
    m, n, rank = SHAPES[shape]
    rng = np.random.default_rng(seed)
    if rank is None:
        return draw(rng, m, n, complex_=complex_)
    return draw(rng, m, rank, complex_=complex_) @ draw(rng, rank, n, complex_=complex_)


def sparse(M):
    return fll.SparseOperator(flj.Sparse(full_pattern(*M.shape), M.reshape(-1)))


OPERATORS = {
    "sparse": sparse,
    "scaled": lambda M: -(2.0 * sparse(M)) / -2.0,
    "matrix": lx.MatrixLinearOperator,
    "function": lambda M: lx.FunctionLinearOperator(
        lambda x: M @ x, jax.ShapeDtypeStruct(M.shape[1:], M.dtype)
    ),
    "tagged": lambda M: lx.TaggedLinearOperator(sparse(M), ()),
}
PAIRS = [*itertools.product(["sparse"], SOLVERS), *itertools.product(OPERATORS, ["colours"])]


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "solver"), PAIRS)
def test_the_solution_is_that_of_the_pseudoinverse(kind, solver, shape, complex_):
    M = matrix(shape, complex_)
    b = draw(np.random.default_rng(1), M.shape[0], complex_=complex_)
    op, solver = OPERATORS[kind](M), SOLVERS[solver](M)
    state = solver.init(op, {})
    value, result, _ = solver.compute(state, b, {})
    assert result == lx.RESULTS.successful
    assert_close(value, np.linalg.pinv(np.asarray(M), rcond=1e-10) @ b)


@pytest.mark.parametrize("shape", ["tall", "deficient wide"])
@pytest.mark.parametrize(("kind", "solver"), PAIRS)
def test_states_of_the_transpose_and_the_conjugate(kind, solver, shape):
    M = matrix(shape, True)
    op, solver = OPERATORS[kind](M), SOLVERS[solver](M)
    state = solver.init(op, {})
    assert eqx.tree_equal(solver.transpose(state, {})[0], solver.init(op.T, {}))
    assert eqx.tree_equal(solver.conj(state, {})[0], solver.init(lx.conj(op), {}))


def test_a_damped_jacobian_and_its_transpose_find_the_pattern_of_the_jacobian():
    pattern = fl.SparsityPattern([0, 1, 2, 2], [0, 1, 0, 1], (3, 2))
    J = jnp.zeros((3, 2)).at[pattern.row, pattern.col].set(jnp.arange(1.0, 5.0))
    damped = jnp.concatenate([J, 0.5 * jnp.eye(2)])
    solver = fll.Cholesky(pattern=pattern)
    for M in (J, J.T, damped, damped.T):
        assert_close(solver.init(lx.MatrixLinearOperator(M), {}).A.todense(), M)
    with pytest.raises(ValueError, match="shape of the operator"):
        solver.init(lx.MatrixLinearOperator(jnp.ones((4, 4))), {})


def test_scaled_sparse_operators_are_not_written_out(monkeypatch):
    monkeypatch.setattr(fll.SparseOperator, "as_matrix", lambda _: pytest.fail("written out"))
    M = matrix("tall")
    for op in (OPERATORS["scaled"](M), OPERATORS["tagged"](M), jnp.asarray(3.0) * sparse(M)):
        assert isinstance(fll.Cholesky().init(op, {}).A, flj.Sparse)


def test_results_say_what_failed():
    M = matrix("tall")
    b = jnp.ones(7)
    bad = {
        "max_steps_reached": (M, b, fll.LSMR(maxiter=1)),
        "conlim": (M * jnp.array([1.0, 1, 1, 1e-3]), b, fll.LSMR(conlim=1.5)),
        "nonfinite_input": (M, b.at[0].set(jnp.nan), fll.QR()),
        "singular": (M.at[0, 0].set(jnp.inf), b, fll.QR()),
    }
    for name, (A, c, solver) in bad.items():
        if hasattr(lx.RESULTS, name):  # two of them came with lineax 0.1
            want = getattr(lx.RESULTS, name)
            assert lx.linear_solve(sparse(A), c, solver, throw=False).result == want, name
    with pytest.raises(Exception, match="non-finite"):
        lx.linear_solve(sparse(M), b.at[0].set(jnp.nan), fll.QR()).value.block_until_ready()


def test_each_member_of_a_batch_has_its_own_result():
    M, b = matrix("tall"), jnp.ones((3, 7)).at[1, 2].set(jnp.nan)
    solve = lambda b: lx.linear_solve(sparse(M), b, fll.QR(), throw=False)  # noqa: E731
    sol = jax.vmap(solve)(b)
    good = jax.vmap(lambda s: s == lx.RESULTS.successful)(sol.result)
    assert good.tolist() == [True, False, True]
    assert_close(sol.value[2], jnp.linalg.pinv(M) @ b[2])


@pytest.mark.skipif(not hasattr(lx, "invert"), reason="lineax before 0.1")
@pytest.mark.parametrize("shape", ["well posed", "deficient"])
def test_inverse_operator_and_its_transpose(shape):
    M = matrix(shape)
    inverse = lx.invert(sparse(M), fll.QR())
    want = np.linalg.pinv(np.asarray(M), rcond=1e-10)
    assert_close(inverse.as_matrix(), want)
    assert_close(inverse.T.mv(jnp.ones(M.shape[1])), want.T @ np.ones(M.shape[1]))


def test_single_precision_stays_single():
    M = matrix("tall").astype(jnp.float32)
    value = lx.linear_solve(sparse(M), jnp.ones(7, jnp.float32), fll.Cholesky()).value
    assert value.dtype == jnp.float32
    assert_close(value, jnp.linalg.pinv(M) @ jnp.ones(7, jnp.float32), 1e-4)
