"""The core on CUDA tensors: the same answers and derivatives as on the CPU, no hidden transfer."""

import warnings

import pytest
import torch

import funclsq as fl

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

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
    for device in ("cpu", "cuda"):
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
@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "lsmr", "lsqr", "cgls"])
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


@pytest.mark.parametrize("solver", ["auto", "qr", "lsmr"])
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
    A = (A * (A.abs() > 0.3)).cuda()
    sparse = (A.to_sparse_coo() if layout == "coo" else A.to_sparse_csr()).requires_grad_()
    fl.lstsq(sparse, b.cuda()).pow(2).sum().backward()
    assert sparse.grad.layout == sparse.layout and sparse.grad.is_cuda


def test_minimum_norm_where_torch_is_wrong():
    A, b = problem("deficient", torch.float64)
    x = fl.lstsq(A.cuda(), b.cuda())
    exact = torch.linalg.pinv(A, rtol=1e-10) @ b
    assert torch.linalg.vector_norm(x.cpu() - exact) < 1e-10 * torch.linalg.vector_norm(exact)


def test_transforms():
    A, b = problem("tall", torch.float64)
    results = []
    for device in ("cpu", "cuda"):
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


def test_few_host_synchronisations_per_iteration():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(400, 200, generator=g, dtype=torch.float64)
    pattern = fl.SparsityPattern(*torch.ones(400, 200).nonzero().T, (400, 200))
    values = A.flatten().cuda()
    b = torch.randn(400, 4, generator=g, dtype=torch.float64).cuda()
    S = fl.Sparse(pattern, values)
    sol = fl.solve(S, b, solver="lsmr", rank="full")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            sol = fl.solve(S, b + 1, solver="lsmr", rank="full")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = sum("synchroniz" in str(w.message) for w in seen)
    iterations = int(sol.iterations.max())
    assert iterations > 30
    assert syncs < iterations, f"{syncs} synchronisations in {iterations} iterations"
