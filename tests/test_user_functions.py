"""Functions that return their argument, or the same memory in every call."""

from __future__ import annotations

import pytest
import torch

import funclsq as fl


def _b():
    return torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("rmatvec", [None, lambda p, v: v])
@pytest.mark.parametrize("damp", [0.0, 0.5])
@pytest.mark.parametrize("rank", ["auto", "full"])
def test_the_identity_may_return_its_argument(rmatvec, damp, rank):
    eye = fl.LinearOperator(lambda p, v: v, (4, 4), (), rmatvec=rmatvec)
    b, share = _b(), 1 / (1 + damp**2)
    x = fl.lstsq(eye, b, damp=damp, rank=rank)
    torch.testing.assert_close(x, share * b)
    (b_bar,) = torch.autograd.grad(x.square().sum(), b)
    torch.testing.assert_close(b_bar, 2 * share**2 * b.detach())
    assert torch.equal(b.detach(), _b().detach())
    plain = b.detach()
    _, x_dot = torch.func.jvp(lambda b: fl.lstsq(eye, b, damp=damp, rank=rank), (plain,), (plain,))
    torch.testing.assert_close(x_dot, share * plain)


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_the_result_may_lie_in_a_buffer_that_is_written_over(solver, damp):
    g = torch.Generator().manual_seed(0)
    A, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 4), (6,)))
    there, back = torch.empty(6, dtype=A.dtype), torch.empty(4, dtype=A.dtype)
    op = fl.LinearOperator(
        lambda p, v: torch.mv(A, v, out=there),
        (6, 4),
        (),
        rmatvec=lambda p, u: torch.mv(A.T, u, out=back),
    )
    b.requires_grad_()
    for kind, operator in (("dense", A), ("function", op)):
        sol = fl.solve(operator, b, damp=damp, solver=solver)
        (b_bar,) = torch.autograd.grad(sol.x.square().sum(), b)
        seen = (sol.x.detach(), b_bar, sol.residual_norm, sol.normal_residual_norm < 1e-12)
        if kind == "dense":
            want = seen
    for got, wanted in zip(seen, want):
        torch.testing.assert_close(got, wanted)


def test_a_users_solver_may_return_what_it_was_given_or_a_buffer():
    eye = torch.eye(4, dtype=torch.float64)
    b = _b()
    x = fl.lstsq(eye, b, solver=lambda A, c: c)
    (b_bar,) = torch.autograd.grad(x.square().sum(), b)
    torch.testing.assert_close(b_bar, 2 * b.detach())

    g = torch.Generator().manual_seed(0)
    A, c = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 4), (6,)))
    buffers = {rows: torch.empty(rows, dtype=A.dtype) for rows in A.shape}

    def solver(M, v):
        return buffers[M.shape[1]].copy_(torch.linalg.pinv(M) @ v)

    def found(**options):
        M, v = (t.clone().requires_grad_() for t in (A, c))
        x = fl.lstsq(M, v, **options)
        kept = x.detach().clone()
        bars = torch.autograd.grad(x.square().sum(), (M, v))
        assert torch.equal(x.detach(), kept)
        return kept, *bars

    for got, want in zip(found(solver=solver), found()):
        torch.testing.assert_close(got, want)
