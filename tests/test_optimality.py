"""x is the minimiser: of every problem, by every solver, in every dtype and layout."""

from __future__ import annotations

import functools

import mpmath
import numpy as np
import pytest
import torch
from cases import DTYPES, LAYOUTS, PROBLEMS, SOLVERS, function, operands, problem
from oracle import check, reference

import funclsq as fl


def _columns(name, x, tensors):
    """Yield (x, b, w, damp, x0) of each column in double precision, as NumPy arrays."""
    p = {n: t.to(torch.complex128 if t.is_complex() else torch.float64) for n, t in tensors.items()}
    A, b = p["A"].numpy(), p["b"].numpy()
    x = x.to(p["A"].dtype).numpy()
    m, n = A.shape
    x, b = (t.reshape(t.shape[0], -1) for t in (x, b))
    k = b.shape[1]
    w = p["weights"].numpy().reshape(m, -1) if "weights" in p else np.ones((m, 1))
    x0 = p["x0"].numpy().reshape(n, -1) if "x0" in p else np.zeros((n, 1))
    damp = np.broadcast_to(p["damp"].numpy() if "damp" in p else 0.0, (n,))
    for j in range(k):
        yield A, x[:, j], b[:, j], w[:, j % w.shape[1]], damp, x0[:, j % x0.shape[1]]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PROBLEMS if name != "graded"])
def test_the_optimality_condition_holds_and_x_is_the_one_nearest_x0(name, dtype, solver):
    ref = reference(name, DTYPES[dtype])
    x = function(ref.problem, "sparse", solver=solver)(*operands(ref.problem, DTYPES[dtype]))
    assert x.dtype == DTYPES[dtype]
    check(x, ref.x, "x")
    eps = torch.finfo(DTYPES[dtype]).eps
    norm = np.linalg.norm
    for A, xj, b, w, damp, x0 in _columns(name, x, ref.data):
        r = b - A @ xj
        s = A.conj().T @ (w * r) - damp**2 * (xj - x0)
        root = np.sqrt(w)
        size = norm(root[:, None] * A)
        terms = size * (norm(root * r) + size * (norm(xj) + norm(x0)) + norm(root * b))
        assert norm(s) <= 10 * eps * (terms + norm(damp) ** 2 * norm(xj - x0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["tall", "wide", "deficient_tall", "everything", "zero_column", "empty", "one_row"]
)
def test_every_layout_gives_the_same_x(name, layout, dtype):
    ref = reference(name, DTYPES[dtype])
    f = function(ref.problem, layout)
    check(f(*operands(ref.problem, DTYPES[dtype], layout)), ref.x, "x")


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "weighted", "damped_partly"])
def test_krylov_solvers_need_only_products(name, solver):
    ref = reference(name, torch.float64)
    f = function(ref.problem, "matrix_free_adjoint", solver=solver)
    check(f(*operands(ref.problem, torch.float64, "matrix_free_adjoint")), ref.x, "x")


def test_gradient_descent_from_x0_ends_at_the_minimiser_nearest_x0():
    """The regression of the SGD tutorial: four columns of rank 2."""
    X = np.linspace((0, 1, 2), (1, 2, 3), 10)
    A = torch.from_numpy(np.column_stack((X, np.ones(10))))
    assert np.linalg.matrix_rank(A.numpy()) == 2
    generator = torch.Generator().manual_seed(3)
    y = A @ torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    y = y + 0.1 * torch.randn(10, generator=generator, dtype=torch.float64)
    x0 = torch.randn(4, generator=generator, dtype=torch.float64)
    x, step = x0.clone(), 1 / torch.linalg.matrix_norm(A, 2) ** 2
    for _ in range(10_000):
        x = x + step * (A.mT @ (y - A @ x))
    assert torch.linalg.vector_norm(A.mT @ (y - A @ x)) < 1e-12
    for solver in SOLVERS:
        for given in (A, A.to_sparse_csr()):
            nearest = fl.lstsq(given, y, x0=x0, solver=solver)
            torch.testing.assert_close(nearest, x, rtol=0, atol=1e-12)
    away = fl.lstsq(A, y)
    assert torch.linalg.vector_norm(away - x) > 0.1  # another minimiser, of the same residual
    assert abs(torch.linalg.vector_norm(y - A @ away) - torch.linalg.vector_norm(y - A @ x)) < 1e-12


def _exact(A, b):
    """A^+ b at 60 digits for A of full column rank."""
    with mpmath.workdps(60):
        M, v = mpmath.matrix(A.tolist()), mpmath.matrix(b.tolist())
        x = mpmath.lu_solve(M.H * M, M.H * v)
        r = v - M * x
        back = [float(sum(abs(t) ** 2 for t in u)) ** 0.5 for u in (x, r)]
        return np.array([float(t) for t in x]), back


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky"])
@pytest.mark.parametrize("cond", [1e4, 1e6])
def test_ill_conditioned_problems_are_as_accurate_as_a_backward_stable_solver(cond, solver):
    rng = np.random.default_rng(5)
    U, _ = np.linalg.qr(rng.standard_normal((12, 5)))
    V, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    A = (U * np.geomspace(1, 1 / cond, 5)) @ V.T
    b = rng.standard_normal(12)
    x, (size, r) = _exact(A, b)
    got = fl.lstsq(torch.from_numpy(A), torch.from_numpy(b), solver=solver).numpy()
    # First-order bound of a perturbation of relative size eps: cond (|x| + cond |r| / |A|).
    bound = np.finfo(float).eps * cond * (size + np.linalg.norm(b) + cond * r)
    assert np.linalg.norm(got - x) <= 10 * bound


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != "svd"])  # svd sees the units
def test_columns_of_different_units_cost_no_digits(solver):
    ref = reference("graded", torch.float64)
    x = function(ref.problem, "sparse", solver=solver)(*operands(ref.problem, torch.float64))
    scaled = (x - ref.x.value).abs().amax(1) / ref.x.value.abs().amax(1)
    assert scaled.max() < 1e-11


# ---------------------------------------------------------------------------------------------
# Batches.


def _members(name, dtype, count):
    p = problem(name, dtype.is_complex)
    rng = np.random.default_rng(11)
    scale = 1 + 0.5 * rng.standard_normal(count)
    data = p.tensors(dtype)
    A = torch.stack([s * data["A"] for s in torch.from_numpy(scale).to(dtype)])
    b = torch.randn(count, *data["b"].shape, dtype=dtype)
    return p, data, A, b


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "square"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_a_batch_is_its_members(name, layout, solver):
    p, _, A, b = _members(name, torch.float64, 3)
    chosen = LAYOUTS[layout]
    f = functools.partial(fl.lstsq, solver=solver)
    whole = f(chosen.wrap(chosen.leaf(A, p.stored), p.stored), b)
    alone = [f(chosen.wrap(chosen.leaf(a, p.stored), p.stored), c) for a, c in zip(A, b)]
    torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_batches_broadcast_as_in_torch_linalg(layout):
    p, data, A, _ = _members("damped", torch.float64, 6)
    A = A.unflatten(0, (2, 3))
    chosen = LAYOUTS[layout]
    given = chosen.wrap(chosen.leaf(A, p.stored), p.stored)
    m, n = p.A.shape
    b = torch.randn(3, m, 2, dtype=torch.float64)
    damp = torch.rand(2, 1, n, dtype=torch.float64)
    w = torch.rand(3, m, 2, dtype=torch.float64)
    x0 = torch.randn(2, 1, n, 2, dtype=torch.float64)
    x = fl.lstsq(given, b, damp=damp, weights=w, x0=x0)
    assert x.shape == (2, 3, n, 2)
    for i in range(2):
        for j in range(3):
            one = fl.lstsq(A[i, j], b[j], damp=damp[i, 0], weights=w[j], x0=x0[i, 0])
            torch.testing.assert_close(x[i, j], one, rtol=1e-11, atol=1e-12)
    vector = fl.lstsq(given, b[0, :, 0], damp=damp)
    assert vector.shape == (2, 3, n)
    torch.testing.assert_close(vector[1, 2], fl.lstsq(A[1, 2], b[0, :, 0], damp=damp[1, 0]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_members_of_a_batch_may_differ_in_rank(solver):
    p = problem("deficient_tall")
    low = torch.from_numpy(p.A)
    full = low + torch.randn(low.shape, dtype=torch.float64) * torch.from_numpy(p.stored)
    zero = torch.zeros_like(low)
    A, b = torch.stack((low, full, zero)), torch.randn(3, 8, 2, dtype=torch.float64)
    want = torch.linalg.pinv(A, rtol=1e-10) @ b
    chosen = LAYOUTS["sparse"]
    got = fl.lstsq(chosen.wrap(chosen.leaf(A, p.stored), p.stored), b, solver=solver)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(fl.lstsq(A, b, solver=solver), want, rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# Shapes and ways to pass operands.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_matrices_without_rows_or_columns(shape, solver):
    m, n = shape
    x0 = torch.randn(n, 2, dtype=torch.float64)
    b = torch.randn(m, 2, dtype=torch.float64)
    for A in (
        torch.zeros(m, n, dtype=torch.float64),
        fl.Sparse(fl.SparsityPattern([], [], shape), torch.zeros(0, dtype=torch.float64)),
    ):
        torch.testing.assert_close(fl.lstsq(A, b, x0=x0, solver=solver), x0)
        assert fl.lstsq(A, b[:, 0], solver=solver).shape == (n,)


def test_a_batch_of_no_members():
    A = torch.zeros(0, 5, 3, dtype=torch.float64)
    assert fl.lstsq(A, torch.randn(5, 2, dtype=torch.float64)).shape == (0, 3, 2)
    S = fl.SparsityPattern([0, 1], [0, 2], (5, 3))
    values = torch.zeros(0, 2, dtype=torch.float64)
    assert fl.lstsq(fl.Sparse(S, values), torch.randn(5, dtype=torch.float64)).shape == (0, 3)


def test_damp_as_a_number_or_a_tensor_is_the_same():
    data = problem("tall").tensors(torch.float64)
    x = fl.lstsq(data["A"], data["b"], damp=0.75)
    for damp in (torch.tensor(0.75, dtype=torch.float64), torch.full((4,), 0.75).double()):
        torch.testing.assert_close(fl.lstsq(data["A"], data["b"], damp=damp), x, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        fl.lstsq(data["A"], data["b"], damp=np.float64(0.75)), x, rtol=0, atol=0
    )


def test_weights_of_a_row_serve_every_column():
    data = problem("weighted").tensors(torch.float64)
    A, b, w = data["A"], data["b"], data["weights"]
    x = fl.lstsq(A, b, weights=w)
    torch.testing.assert_close(fl.lstsq(A, b, weights=w[:, None]), x, rtol=1e-14, atol=0)
    torch.testing.assert_close(fl.lstsq(A, b, weights=w[:, None].expand(-1, 2)), x)


def test_weight_zero_is_a_missing_row():
    data = problem("weighted_zeros").tensors(torch.float64)
    A, b, w = data["A"], data["b"], data["weights"]
    wrong = torch.where(w[:, None] == 0, 1e6, b)
    torch.testing.assert_close(fl.lstsq(A, wrong, weights=w), fl.lstsq(A, b, weights=w))
    there = w > 0
    torch.testing.assert_close(
        fl.lstsq(A[there], b[there], weights=w[there]), fl.lstsq(A, b, weights=w)
    )


def test_a_tiny_and_a_huge_problem_are_solved_like_a_moderate_one():
    data = problem("tall").tensors(torch.float64)
    x = fl.lstsq(data["A"], data["b"])
    for scale in (1e-150, 1e150):
        for solver in SOLVERS:
            got = fl.lstsq(scale * data["A"], scale * data["b"], solver=solver)
            torch.testing.assert_close(got, x, rtol=1e-11, atol=0)


@pytest.mark.parametrize("layout", ["dense", "sparse", "csr", "coo_uncoalesced"])
def test_inputs_are_never_written_to(layout):
    p = problem("everything")
    leaf, *rest = operands(p, torch.float64, layout)
    before = [leaf.to_dense().clone(), *(t.clone() for t in rest)]
    for solver in SOLVERS:
        x = function(p, layout, solver=solver)(leaf.requires_grad_(), *rest)
        x.square().sum().backward()
    assert all(map(torch.equal, [leaf.detach().to_dense(), *rest], before))
