"""On a device: the same answers and derivatives as on the CPU, no hidden transfer."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE, waits

import funclsq as fl
from funclsq.backends import registry
from funclsq.methods import _normal

pytestmark = pytest.mark.cuda

SHAPES = {
    "tall": (60, 12, 12),
    "wide": (12, 40, 12),
    "square": (15, 15, 15),
    "deficient": (50, 14, 9),
}


def problem(shape, dtype, seed=0):
    m, n, rank = SHAPES[shape]
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=g, dtype=dtype)
    right = torch.randn(rank, n, generator=g, dtype=dtype)
    A = left @ right if rank < min(m, n) else torch.randn(m, n, generator=g, dtype=dtype)
    return A, torch.randn(m, 3, generator=g, dtype=dtype)


def both(function, *tensors):
    """Value and gradients on the CPU and on the device."""
    out = []
    for device in ("cpu", DEVICE):
        leaves = [t.detach().to(device).requires_grad_() for t in tensors]
        x = function(*leaves)
        assert x.device.type == device
        seed = torch.linspace(1, 2, x.numel(), dtype=torch.float64).to(x.device, x.real.dtype)
        bars = torch.autograd.grad((x * seed.view(x.shape)).abs().pow(2).sum(), leaves)
        assert all(bar.device.type == device for bar in bars)
        out.append([x.detach().cpu(), *(bar.cpu() for bar in bars)])
    return out


def assert_same(pair, tolerance):
    for host, device in zip(*pair):
        assert torch.linalg.vector_norm(host - device) <= tolerance * torch.linalg.vector_norm(host)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("solver", ["auto", "cholesky", "qr", "svd", "lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_same_as_cpu(kind, shape, solver, dtype):
    A, b = problem(shape, dtype)
    m, n = A.shape
    pattern = fl.SparsityPattern(*torch.ones(m, n).nonzero().T, (m, n))

    def run(values, b):
        A = values.view(m, n) if kind == "dense" else fl.Sparse(pattern, values)
        return fl.lstsq(A, b, solver=solver)

    def fixed_rank(values, b):
        return run(values, b)

    if shape == "deficient":  # move along the fixed-rank set only
        rank = SHAPES[shape][2]
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        left, right = U[:, :rank] * s[:rank], Vh[:rank]

        def fixed_rank(left, right, b):
            return run((left @ right).flatten(), b)

        assert_same(both(fixed_rank, left, right, b), 1e-9)
    else:
        assert_same(both(fixed_rank, A.flatten(), b), 1e-9)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "qr", "lsmr"])
def test_damped_weighted(solver):
    A, b = problem("tall", torch.float64)
    w = torch.linspace(0, 1, A.shape[0], dtype=torch.float64)
    damp = torch.tensor(0.3, dtype=torch.float64)
    x0 = torch.ones(A.shape[1], 3, dtype=torch.float64)

    def run(A, b, w, damp, x0):
        return fl.lstsq(A, b, weights=w, damp=damp, x0=x0, solver=solver)

    assert_same(both(run, A, b, w, damp, x0), 1e-10)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_layouts(layout):
    A, b = problem("tall", torch.float64)
    A = (A * (A.abs() > 0.3)).to(DEVICE)
    sparse = (A.to_sparse_coo() if layout == "coo" else A.to_sparse_csr()).requires_grad_()
    fl.lstsq(sparse, b.to(DEVICE)).pow(2).sum().backward()
    assert sparse.grad.layout == sparse.layout and sparse.grad.device.type == DEVICE


def test_minimum_norm_where_torch_is_wrong():
    A, b = problem("deficient", torch.float64)
    x = fl.lstsq(A.to(DEVICE), b.to(DEVICE))
    exact = torch.linalg.pinv(A, rtol=1e-10) @ b
    assert torch.linalg.vector_norm(x.cpu() - exact) < 1e-10 * torch.linalg.vector_norm(exact)


def test_transforms():
    A, b = problem("tall", torch.float64)
    results = []
    for device in ("cpu", DEVICE):
        a, c = A.to(device), b.T.contiguous().to(device)

        def loss(a, c):
            return fl.lstsq(a, c).pow(3).sum()

        results.append(
            [
                torch.func.vmap(torch.func.grad(loss), (None, 0))(a, c).cpu(),
                torch.func.hessian(loss, 1)(a, c[0]).cpu(),
                torch.func.jacfwd(torch.func.jacfwd(loss, 1), 1)(a, c[0]).cpu(),
            ]
        )
    assert_same(results, 1e-10)


def sparse(values, A):
    m, n = A.shape
    return fl.Sparse(fl.SparsityPattern(*torch.ones(m, n).nonzero().T, (m, n)), values.flatten())


def given(*shape, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g, dtype=dtype) + 0.5


def layer(shape, device, A, b):
    made = fl.nn.LeastSquares(torch.ones(shape, dtype=torch.float64), damp=0.1, trainable="damp")
    return torch.func.functional_call(made.to(device), {"A": A}, (b,))


WHOLE = {  # name: what is done with A and b, and whatever else is made
    "preconditioned by a factor of another matrix": lambda A, b: fl.lstsq(
        A, b, solver="lsmr", preconditioner=fl.factorize(A.detach() + 0.01)
    ),
    "in single precision": lambda A, b: fl.lstsq(A.float(), b.float()).double(),
    "single precision, double inside": lambda A, b: fl.lstsq(
        A.float(), b.float(), compute_dtype=torch.float64
    ).double(),
    "factor once": lambda A, b: fl.factorize(A).solve(b),
    "covariance": lambda A, b: fl.covariance(fl.factorize(A)) * b.sum(),
    "variances of a sparse matrix": lambda A, b: (
        fl.covariance(fl.factorize(sparse(A, A)), diag=True) * b.sum()
    ),
    "ridge path": lambda A, b: (
        fl.ridge.ridge_path(A, b[:, 0], given(5).sort().values.to(b.device)).x * b.sum()
    ),
    "regression": lambda A, b: fl.linear_regression(A, b).coefficients,
    "regression, standard errors": lambda A, b: fl.linear_regression(A, b).standard_errors,
    "regression, sparse": lambda A, b: fl.linear_regression(sparse(A, A), b).standard_errors,
    "gradient descent": lambda A, b: (
        fl.solvers.gradient_descent(A, b, damp=1.0, momentum=0.5, nesterov=True).x
    ),
    "unrolled gradient descent": lambda A, b: (
        fl.solvers.gradient_descent(A, b, maxiter=40, unrolled=True, on_failure="ignore").x
    ),
    "sparse gradient descent": lambda A, b: fl.solvers.gradient_descent(sparse(A, A), b).x,
    "operator": lambda A, b: fl.lstsq(
        fl.LinearOperator(
            lambda p, v: p[0] @ v, A.shape, params=(A,), rmatvec=lambda p, u: p[0].mH @ u
        ),
        b,
        solver="lsmr",
    ),
    "operator without its adjoint": lambda A, b: fl.lstsq(
        fl.LinearOperator(lambda p, v: p[0] @ v, A.shape, params=(A,)), b, solver="lsqr", damp=0.5
    ),
    "fixed point": lambda A, b: fl.lstsq(A, b, x0=fl.lstsq(A, b) + 1, damp=0.2),
    "damping of each unknown": lambda A, b: fl.lstsq(
        sparse(A, A), b, damp=given(A.shape[1]).to(b.device), solver="lsmr"
    ),
    "weights of each column": lambda A, b: fl.lstsq(A, b, weights=given(*b.shape).to(b.device)),
    "batch": lambda A, b: fl.lstsq(torch.stack((A, 2 * A, A + 0.1)), torch.stack((b, b, -b))),
    "batch of sparse matrices, iterative": lambda A, b: torch.func.vmap(
        lambda v, c: fl.lstsq(sparse(v, A), c, solver="lsmr")
    )(torch.stack((A.flatten(), 2 * A.flatten())), torch.stack((b, -b))),
    "batch of sparse matrices": lambda A, b: torch.func.vmap(
        lambda v, c: fl.lstsq(sparse(v, A), c)
    )(torch.stack((A.flatten(), 2 * A.flatten())), torch.stack((b, -b))),
    "one matrix, batch of right-hand sides": lambda A, b: torch.func.vmap(
        lambda c: fl.lstsq(sparse(A, A), c)
    )(b.T),
    "layer": lambda A, b: layer(A.shape, b.device, A, b),
    "sparse layer": lambda A, b: torch.func.functional_call(
        fl.nn.LeastSquares(sparse(torch.ones_like(A), A), damp=0.1), {"A": A.flatten()}, (b,)
    ),
    "objective": lambda A, b: torch.func.functional_call(
        fl.nn.Objective(fl.nn.LeastSquares(A.detach(), b.detach(), damp=0.1), b[:12] * 0),
        {"problem.A": A, "problem.b": b},
    ),
    "factor once, cholesky": lambda A, b: fl.factorize(sparse(A, A), solver="cholesky").solve(b),
    "cholesky of a sparse batch": lambda A, b: torch.func.vmap(
        lambda v, c: fl.lstsq(sparse(v, A), c, solver="cholesky")
    )(torch.stack((A.flatten(), 2 * A.flatten())), torch.stack((b, -b))),
    "cholesky of a batch": lambda A, b: fl.lstsq(
        torch.stack((A, A + 0.1)), torch.stack((b, -b)), solver="cholesky"
    ),
    "cholesky of few rows, damped": lambda A, b: fl.lstsq(
        sparse(A.mT, A.mT), b[:12], damp=0.3, solver="cholesky"
    ),
    "cholesky of a sparse batch, damped": lambda A, b: torch.func.vmap(
        lambda v, c, d: fl.lstsq(sparse(v, A), c, damp=d, solver="cholesky")
    )(torch.stack((A.flatten(), 2 * A.flatten())), torch.stack((b, -b)), given(2).to(b.device)),
    "cholesky of dependent columns": lambda A, b: fl.lstsq(
        sparse(torch.cat((A, A), 1), torch.cat((A, A), 1)), b, solver="cholesky"
    ),
    "products": lambda A, b: sparse(A, A) @ (sparse(A, A).H @ b),
    "torchsparsegradutils' function": lambda A, b: fl.compat.sparse_generic_lstsq(
        A.to_sparse_csr(), b
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_offered(name):
    A, b = problem("tall", torch.float64)
    A = A / A.norm() * 6
    tolerance = 1e-4 if name == "in single precision" else 1e-6 if "single" in name else 1e-9
    assert_same(both(WHOLE[name], A, b), tolerance)


MADE = {
    "scaling": lambda A: fl.preconditioners.block_diagonal(A, 1),
    "blocks": lambda A: fl.preconditioners.block_diagonal(A, 4),
    "sketch": lambda A: fl.preconditioners.sketch(A),
}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", MADE)
def test_preconditioners_are_made_on_the_cpu(name, kind):
    A, _ = problem("tall", torch.float64)
    A = A.to(DEVICE)
    with pytest.raises(ValueError, match=r"must be on the CPU.*\.cpu\(\)"):
        MADE[name](A if kind == "dense" else sparse(A, A))


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_end_where_they_end_on_the_cpu(shape, solver):
    """Steps beyond convergence would bring rounding into x where A is rank deficient."""
    A, b = problem(shape, torch.float64)
    b[:, 1] = A @ torch.ones(A.shape[1], dtype=A.dtype)  # which ends sooner or later than others
    b[:, 2] = 0
    host, device = (
        fl.solve(A.to(d), b.to(d), solver=solver, rank=SHAPES[shape][2]) for d in ("cpu", DEVICE)
    )
    assert (device.iterations.cpu() - host.iterations).abs().max() <= 8
    assert torch.equal(device.status.cpu(), host.status)
    assert_same([[host.x], [device.x.cpu()]], 1e-11)


def test_what_is_not_finite_is_told():
    A, b = problem("tall", torch.float64)
    A, b = A.to(DEVICE), b.to(DEVICE)
    wrong = b.clone()
    wrong[3, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        fl.lstsq(A, wrong)
    for solver in ("cholesky", "qr", "svd", "lsmr", "lsqr", "cgls"):
        sol = fl.solve(A, wrong, solver=solver, check_finite=False, on_failure="ignore")
        assert [fl.Status(int(s)).name == "NONFINITE" for s in sol.status] == [False, True, False]
        assert torch.isfinite(sol.x[:, [0, 2]]).all()


@pytest.fixture
def without_cudss(monkeypatch):
    monkeypatch.setattr(registry, "_cudss", lambda device: ImportError("no such library"))


def banded(n, device, size=3.0):
    """A sparse matrix with a sparse normal matrix, and b."""
    A = torch.eye(n, dtype=torch.float64) * size + torch.diag(torch.ones(n - 1).double(), -1)
    pattern = fl.SparsityPattern(*A.nonzero().T, (n, n))
    return fl.Sparse(pattern, A[A != 0].to(device)), torch.ones(n, 2, device=device).double()


def test_a_sparse_factor_on_a_device_needs_cudss(monkeypatch, without_cudss):
    A, b = banded(90, DEVICE)
    x = fl.lstsq(A, b, solver="cholesky")  # written out
    monkeypatch.setattr(_normal, "DENSE_ORDER", 89)
    other, _ = banded(90, DEVICE, 4.0)
    for options in ({}, {"backend": "auto"}, {"backend": "cudss"}):
        with pytest.raises(ValueError, match=r"order 90 on .* is factored by cuDSS.*lsmr"):
            fl.lstsq(other, b, solver="cholesky", **options)
    with pytest.raises(ValueError, match=r"'rslab' is for the CPU; got a matrix on"):
        fl.lstsq(other, b, solver="cholesky", backend="rslab")
    assert_same([[fl.lstsq(A, b, solver="lsmr").cpu()], [x.cpu()]], 1e-10)


def test_operands_on_two_devices_are_refused():
    A, b = problem("tall", torch.float64)
    with pytest.raises(ValueError, match="device"):
        fl.lstsq(A.to(DEVICE), b)
    with pytest.raises(ValueError, match="device"):
        fl.lstsq(A, b.to(DEVICE))
    with pytest.raises(ValueError, match="device"):
        fl.lstsq(A.to(DEVICE), b.to(DEVICE), x0=torch.zeros(A.shape[1], dtype=A.dtype))


def test_a_solution_prints_itself():
    A, b = problem("deficient", torch.float64)
    text = str(fl.solve(A.to(DEVICE), b.to(DEVICE)))
    assert "rank" in text


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("solver", ["auto", "cholesky", "qr", "svd", "lsmr", "lsqr", "cgls"])
def test_the_host_waits_seldom_and_moves_little(solver, kind):
    """Numbers of each column, and none of A, b or x; a look every eight steps."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(160, 80, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    b = torch.randn(160, 4, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_()
    M = A if kind == "dense" else sparse(A, A)
    first = fl.solve(M, b + 1, solver=solver, rank="full")  # index arrays move once
    torch.autograd.grad(first.x.sum(), (A, b), retain_graph=kind == "sparse")
    with waits() as forward:
        sol = fl.solve(M, b, solver=solver, rank="full")
    with waits() as backward:
        torch.autograd.grad(sol.x.sum(), (A, b))
    looks = int(sol.iterations.max()) // 8
    assert forward.total <= 24 + looks, (forward.total, forward.reasons, looks)
    assert backward.total <= 24 + looks, (backward.total, backward.reasons, looks)
    if DEVICE != "cuda":  # where the bytes are known
        for seen in (forward, backward):
            assert max(seen.bytes.values()) <= 4 * 8 * (60 + 8 * looks), seen.bytes
