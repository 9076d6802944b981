"""What fuzzing found at the ends of the range, reduced."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import funclsq as fl
from funclsq.methods.svd import thin_svd

F64 = torch.float64


def test_a_row_of_weight_zero_may_be_too_large_to_scale():
    """Scaled to the small rows that count, the large ones overflow, and 0 inf is NaN."""
    A = torch.tensor([[1e34, -1e34], [1e-36, 2e-36], [3e-36, -1e-36]])
    b = torch.tensor([[1e-37], [2e-36], [1e-36]])
    w = torch.tensor([[0.0], [1.0], [0.5]])
    x = fl.lstsq(A, b, weights=w, solver="qr")
    want = np.linalg.solve(A[1:].double().numpy() * 1e36, b[1:].double().numpy() * 1e36)
    np.testing.assert_allclose(x.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_entries_at_both_ends_of_the_range(dtype):
    """LAPACK's QR makes NaN of a row of subnormal numbers below one of ordinary ones."""
    tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
    g = torch.Generator().manual_seed(0)
    A = torch.randn((5, 8), dtype=dtype, generator=g)
    A = A * torch.tensor([tiny, 0.3, tiny * eps, 1e-15, tiny / 8, 4 * tiny, 1, tiny])
    A[1:4] = 0
    b = torch.randn(5, dtype=dtype, generator=g)
    for solver in ("auto", "qr", "svd", "cholesky"):
        sol = fl.solve(A.clone(), b, solver=solver)
        assert bool(sol.converged) and bool(torch.isfinite(sol.x).all())
        s = A.mH @ (b - A @ sol.x)
        assert torch.linalg.vector_norm(s) < 100 * eps * torch.linalg.vector_norm(b)


def test_large_numbers_beside_a_row_without_weight():
    """Null vectors were spoilt by the column of zeros, which keeps a scale of its own."""
    A = torch.tensor(
        [[-0.7, 6.5625e35, -0.65, -8.4375e23], [-0.4, -7.8125e35, -2.17, -1.8984e24],
         [0.4, 2.5781e35, 1.38, 1.2812e24], [-0.4, 1.9766e36, 1.79, 1.1680e24]], dtype=F64,
    )  # fmt: skip
    b = torch.tensor([8.75, 10.625, -2.5, -15.0], dtype=F64)
    w = torch.tensor([0.1875, 0.9375, 0.0, 0.3125], dtype=F64)
    got, want = (fl.solve(A, b, weights=w, solver=solver) for solver in ("cholesky", "svd"))
    assert int(got.rank) == int(want.rank) == 2
    torch.testing.assert_close(got.x / want.x[3], want.x / want.x[3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky"])
def test_one_member_that_is_not_finite_spoils_no_other(solver, shape):
    A = torch.randn((2, *shape), dtype=F64)
    b = torch.randn((2, shape[0], 1), dtype=F64)
    A[1, 2, 1] = torch.nan
    sol = fl.solve(A, b, solver=solver, check_finite=False, on_failure="ignore")
    assert sol.status[:, 0].tolist() == [fl.Status.DIRECT, fl.Status.NONFINITE]
    assert bool(sol.x[1].isnan().all())
    torch.testing.assert_close(sol.x[0], torch.linalg.pinv(A[0]) @ b[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_a_matrix_that_divide_and_conquer_gives_up_on(dtype, monkeypatch):
    A = torch.randn((2, 3, 5, 4), dtype=dtype)

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    U, s, Vh = thin_svd(A)
    torch.testing.assert_close((U * s.unsqueeze(-2)) @ Vh, A)
    assert s.shape == (2, 3, 4)
