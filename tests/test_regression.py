"""Linear regression: certified digits, standard errors, and their derivatives."""

from __future__ import annotations

import json

import mpmath
import numpy as np
import pytest
import torch
from realdata import data_path

import funclsq as fl
from funclsq.extended import accurate_sum, two_product

F64 = torch.float64


@pytest.fixture
def data():
    X = torch.randn(30, 3, dtype=F64)
    return X, X @ torch.tensor([1.0, -2.0, 0.5], dtype=F64) + 4 + torch.randn(30, dtype=F64)


# Certified values

# Fewest significant digits that any coefficient, and any standard error, has in common with the
# certified values. The design of Filip has x^10 rounded to float64, which costs its other digits.
DIGITS = {
    "Norris": (1, 12, 12),
    "NoInt1": (1, 14, 14),
    "Wampler1": (5, 14, 14),
    "Wampler3": (5, 14, 13),
    "Filip": (10, 7, 7),
}


def nist(name):
    certified = json.loads(data_path("nist/certified_linear.json").read_text())[name]
    lines = data_path(f"nist/{name}.dat").read_text().splitlines()
    rows = [line.split() for line in lines[certified["data_first_line"] - 1 :] if line.strip()]
    y, x = (torch.tensor([float(row[i]) for row in rows], dtype=F64) for i in (0, 1))
    return certified, y, x[:, None] ** torch.arange(1, DIGITS[name][0] + 1)


def digits(got, want):
    """Digits in common, the worst over entries; of the error itself where the value is 0."""
    want = np.asarray(want)
    error = np.abs(np.asarray(got) - want) / np.where(want == 0, 1, np.abs(want))
    return float(np.min(-np.log10(np.maximum(error, 1e-16))))


@pytest.mark.parametrize("name", DIGITS)
def test_nist_certified_digits(name):
    _, needed, needed_errors = DIGITS[name]
    certified, y, X = nist(name)
    one = name != "NoInt1"
    fit = fl.linear_regression(X, y, intercept=one)
    beta = torch.cat([fit.intercept[None], fit.coefficients]) if one else fit.coefficients
    errors = torch.cat([fit.intercept_error[None], fit.standard_errors])
    errors = errors if one else fit.standard_errors
    assert digits(beta, certified["beta"]) >= needed
    assert digits(errors, certified["beta_sd"]) >= needed_errors
    assert digits(fit.variance.sqrt(), certified["residual_sd"]) >= needed_errors
    assert int(fit.degrees_of_freedom) == certified["dof"]
    assert int(fit.rank) == X.shape[1] + one
    if one:
        torch.testing.assert_close(
            torch.cat([fit.standard_errors, fit.intercept_error[None]]),
            fit.covariance.diagonal().sqrt(),
        )


@pytest.mark.parametrize("name", ["Filip", "Wampler1"])
def test_exact_for_the_data_as_stored(name):
    """Against 60 digits on the same float64 design: nothing is lost but the last digits."""
    _, y, X = nist(name)
    fit = fl.linear_regression(X, y)
    with mpmath.workdps(60):
        A = mpmath.matrix(np.c_[X.numpy(), np.ones(len(y))].tolist())
        G = A.T * A
        want = mpmath.lu_solve(G, A.T * mpmath.matrix(y.tolist()))
        want = np.array([float(v) for v in want])
    got = torch.cat([fit.coefficients, fit.intercept[None]])
    assert digits(got, want) > 14


# The parts


def test_against_the_formulas(data):
    X, y = data
    fit = fl.linear_regression(X, y)
    A = torch.cat([X, torch.ones(30, 1, dtype=F64)], 1)
    N = torch.linalg.inv(A.T @ A)
    beta = N @ A.T @ y
    r = y - A @ beta
    torch.testing.assert_close(fit.coefficients, beta[:3])
    torch.testing.assert_close(fit.intercept, beta[3])
    torch.testing.assert_close(fit.residuals, r)
    torch.testing.assert_close(fit.covariance, N * (r @ r) / 26)
    assert int(fit.degrees_of_freedom) == 26
    plain = fl.linear_regression(X, y, intercept=False, covariance=False)
    torch.testing.assert_close(plain.coefficients, torch.linalg.lstsq(X, y[:, None])[0][:, 0])
    assert float(plain.intercept) == 0
    assert plain.covariance is None
    assert plain.standard_errors is None


@pytest.mark.parametrize("kind", ["numpy", "csr", "sparse", "scipy"])
def test_every_kind_of_design(data, kind):
    X, y = data
    X = X * (torch.rand(30, 3) < 0.7)
    S = fl.Sparse.from_torch(X.to_sparse_coo())
    given = {"numpy": X.numpy(), "csr": X.to_sparse_csr(), "sparse": S, "scipy": S.to_scipy()}[kind]
    want, fit = fl.linear_regression(X, y), fl.linear_regression(given, y)
    for name in ("coefficients", "intercept", "residuals", "covariance", "standard_errors"):
        torch.testing.assert_close(getattr(fit, name), getattr(want, name))
    assert int(fit.rank) == 4


def test_several_responses_and_weights(data):
    X, y = data
    Y = torch.stack([y, y**2], 1)
    fit = fl.linear_regression(X, Y)
    W = torch.rand(30, 2, dtype=F64)
    W[:4] = 0
    per_column = fl.linear_regression(X, Y, weights=W)
    shared = fl.linear_regression(X, Y, weights=W[:, 0])
    for j in range(2):
        for many, one in (
            (fit, fl.linear_regression(X, Y[:, j])),
            (per_column, fl.linear_regression(X, Y[:, j], weights=W[:, j])),
            (shared, fl.linear_regression(X, Y[:, j], weights=W[:, 0])),
        ):
            torch.testing.assert_close(many.coefficients[:, j], one.coefficients)
            torch.testing.assert_close(many.standard_errors[:, j], one.standard_errors)
            torch.testing.assert_close(many.residuals[:, j], one.residuals)
            for name in ("intercept", "intercept_error", "variance", "covariance", "rank"):
                torch.testing.assert_close(getattr(many, name)[j], getattr(one, name))
    dropped = fl.linear_regression(X[4:], Y[4:, 0], weights=W[4:, 0])
    torch.testing.assert_close(shared.standard_errors[:, 0], dropped.standard_errors)
    assert int(dropped.degrees_of_freedom) == int(shared.degrees_of_freedom[0]) == 22


@pytest.mark.parametrize(
    "damp", [0.8, torch.tensor([0.5, 0.0, 2.0], dtype=F64)], ids=["one", "each"]
)
def test_ridge_spares_the_intercept(data, damp):
    X, y = data
    fit = fl.linear_regression(X, y, damp=damp)
    A = torch.cat([X, torch.ones(30, 1, dtype=F64)], 1)
    d2 = torch.cat([torch.as_tensor(damp, dtype=F64).expand(3) ** 2, torch.zeros(1, dtype=F64)])
    G = A.T @ A + torch.diag(d2)
    torch.testing.assert_close(
        torch.cat([fit.coefficients, fit.intercept[None]]), torch.linalg.solve(G, A.T @ y)
    )
    hat = torch.linalg.solve(G, A.T @ A)
    torch.testing.assert_close(fit.degrees_of_freedom, 30 - hat.trace())
    torch.testing.assert_close(fit.covariance, fit.variance * hat @ torch.linalg.inv(G))
    torch.testing.assert_close(
        fit.residuals.sum(), torch.tensor(0.0, dtype=F64), atol=1e-12, rtol=0
    )


def test_the_tutorials_data_have_rank_two():
    X = torch.from_numpy(np.linspace((0, 1, 2), (1, 2, 3), 10))
    torch.manual_seed(0)
    y = X @ torch.tensor([3.0, 6.0, 9.0], dtype=F64) + 3
    y = y + torch.randn(y.shape)
    start = torch.cat([torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)])
    A = torch.cat([X, torch.ones(10, 1, dtype=F64)], 1)
    fit = fl.linear_regression(X, y)
    assert int(fit.rank) == int(fl.solve(A, y).rank) == 2
    assert int(fit.degrees_of_freedom) == 8
    assert fit.covariance.isnan().all()
    assert fit.standard_errors.isnan().all()
    least = torch.linalg.pinv(A) @ y
    torch.testing.assert_close(torch.cat([fit.coefficients, fit.intercept[None]]), least)
    assert float(fit.residuals @ fit.residuals) == pytest.approx(11.347854769083378, abs=1e-8)
    x = fl.lstsq(A, y, x0=start)
    end = torch.tensor([2.9161651, 6.49297422, 8.25240041, 3.8987414381436416], dtype=F64)
    torch.testing.assert_close(x, end, rtol=0, atol=1e-8)
    assert float(((A @ x - y) ** 2).sum()) == pytest.approx(11.347854769083378, abs=1e-8)


def test_as_many_rows_as_parameters(data):
    X, y = data
    fit = fl.linear_regression(X[:4], y[:4])
    assert int(fit.degrees_of_freedom) == 0
    assert fit.variance.isnan()
    torch.testing.assert_close(fit.residuals, torch.zeros(4, dtype=F64))


def test_complex_and_single_precision(data):
    X, y = data
    fit = fl.linear_regression(X.float(), y.float())
    assert fit.covariance.dtype == torch.float32
    exact = fl.linear_regression(X.float().double(), y.float().double())
    torch.testing.assert_close(fit.coefficients, exact.coefficients.float(), rtol=3e-7, atol=0)
    Z = torch.complex(X, X.flip(0))
    fit = fl.linear_regression(Z, torch.complex(y, -y))
    A = torch.cat([Z, torch.ones(30, 1, dtype=Z.dtype)], 1)
    torch.testing.assert_close(fit.coefficients, (torch.linalg.pinv(A) @ torch.complex(y, -y))[:3])
    assert fit.standard_errors.dtype == F64


# Derivatives


def test_differentiable_in_everything(data):
    X, y = data
    weights = torch.rand(30, dtype=F64) + 0.1
    damp = torch.tensor(0.6, dtype=F64)

    def f(X, y, weights, damp):
        fit = fl.linear_regression(X, y, weights=weights, damp=damp)
        return fit.coefficients, fit.intercept, fit.standard_errors, fit.intercept_error

    inputs = tuple(t.clone().requires_grad_() for t in (X[:7, :2], y[:7], weights[:7], damp))
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_under_transforms(data):
    X, y = data

    def f(t):
        fit = fl.linear_regression(X + t * X**2, y)
        return torch.cat([fit.coefficients, fit.standard_errors])

    t = torch.tensor(0.2, dtype=F64)
    h = 1e-4
    second = (f(t + h) - 2 * f(t) + f(t - h)) / h**2
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        got = outer(torch.func.jacfwd(f))(t)
        torch.testing.assert_close(got, second, rtol=1e-4, atol=1e-5)
    ts = torch.tensor([0.1, 0.2], dtype=F64)
    torch.testing.assert_close(torch.func.vmap(f)(ts)[1], f(ts[1]))
    fits = torch.func.vmap(lambda y: fl.linear_regression(X, y))(torch.stack([y, 2 * y]))
    torch.testing.assert_close(fits.standard_errors[1], 2 * fits.standard_errors[0])


# Batches, and what cannot be known

FIELDS = [
    "coefficients",
    "intercept",
    "residuals",
    "rank",
    "degrees_of_freedom",
    "variance",
    "covariance",
    "standard_errors",
    "intercept_error",
]


@pytest.mark.parametrize("damp", [0.0, 0.7])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("batched", ["X", "weights"])
def test_a_batch_with_one_vector_is_its_members(data, batched, intercept, damp):
    X, y = data
    many = torch.stack([X * (i + 1) for i in range(6)])  # more members than parameters
    W = torch.rand(6, 30, 1, dtype=F64) + 0.5
    how = {"intercept": intercept, "damp": damp}
    if batched == "X":
        fit = fl.linear_regression(many, y, **how)
        members = [fl.linear_regression(one, y, **how) for one in many]
    else:
        fit = fl.linear_regression(X, y, weights=W, **how)
        members = [fl.linear_regression(X, y, weights=w[:, 0], **how) for w in W]
    for name in FIELDS:
        want = torch.stack([getattr(one, name) for one in members])
        torch.testing.assert_close(getattr(fit, name), want, rtol=1e-10, atol=1e-12)


def test_degrees_of_freedom_are_not_made_up(data):
    X, y = data

    def own(A, b):
        return torch.linalg.lstsq(A, b).solution

    fit = fl.linear_regression(X, y, solver=own)
    assert int(fit.rank) == -1
    assert fit.degrees_of_freedom.isnan()
    assert fit.variance.isnan()
    Y = torch.stack((y, 2 * y), 1)
    fit = fl.linear_regression(X, Y, damp=2.0, covariance=False)
    assert fit.degrees_of_freedom.isnan().tolist() == [True, True]
    full = fl.linear_regression(X, Y, damp=2.0)
    assert (full.degrees_of_freedom > 30 - 4).all()
    torch.testing.assert_close(fit.coefficients, full.coefficients)
    fit = fl.linear_regression(X, Y, damp=torch.zeros((), dtype=F64), covariance=False)
    assert fit.degrees_of_freedom.tolist() == [26.0, 26.0]


# Errors and tools


def test_errors(data):
    X, y = data
    with pytest.raises(TypeError, match="entries are at hand"):
        fl.linear_regression(fl.LinearOperator(lambda p, v: X @ v, (30, 3)), y)
    with pytest.raises(ValueError, match="one regressor"):
        fl.linear_regression(X[:, 0], y)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        fl.linear_regression(X, y, damp=torch.ones(4, dtype=F64))
    with pytest.raises(ValueError, match="30 rows"):
        fl.linear_regression(X, y[:5])
    with pytest.raises(TypeError, match="unknown setting"):
        fl.linear_regression(X, y, tolerance=1)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_sums_in_twice_the_precision(dtype):
    a, b = torch.randn(2, 101, dtype=dtype)
    p, e = two_product(a, b)
    with mpmath.workdps(60):
        exact = [mpmath.mpf(float(x)) * mpmath.mpf(float(y)) for x, y in zip(a, b)]
        assert all(mpmath.mpf(float(s)) + float(t) == v for s, t, v in zip(p, e, exact))
        # a sum that cancels to nearly nothing
        big = torch.cat([p * 2**20, p, -p * 2**20])
        low = torch.cat([e * 2**20, e, -e * 2**20])
        want = float(mpmath.fsum(exact))
    got = float(accurate_sum(big, low))
    assert got == pytest.approx(want, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("damp", ["zeros", "some", "all"])
def test_degrees_of_freedom_of_a_damped_design_that_lacks_rank(damp):
    """m - trace of the hat matrix, which is the rank less what damping takes."""
    rng = np.random.default_rng(3)
    X = rng.standard_normal((18, 4))
    X[:, 3] = X[:, 0] - X[:, 1]
    y = rng.standard_normal(18)
    d = {"zeros": np.zeros(4), "some": np.array([0, 0, 0.7, 0]), "all": np.full(4, 0.7)}[damp]
    fit = fl.linear_regression(X, y, intercept=False, damp=torch.from_numpy(d))
    hat = X @ np.linalg.pinv(np.vstack((X, np.diag(d))), rcond=1e-10)[:, :18]
    dof = 18 - np.trace(hat)
    r = y - hat @ y
    np.testing.assert_allclose(float(fit.degrees_of_freedom), dof, rtol=1e-12)
    np.testing.assert_allclose(float(fit.variance), r @ r / dof, rtol=1e-12)


def test_no_variance_without_degrees_of_freedom():
    X = np.random.default_rng(0).standard_normal((5, 5))
    fit = fl.linear_regression(
        X, X[:, 0], intercept=False, damp=torch.zeros(5, dtype=torch.float64)
    )
    assert abs(float(fit.degrees_of_freedom)) < 1e-9 and np.isnan(float(fit.variance))
