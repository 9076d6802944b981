"""The call shapes of torchsparsegradutils: its examples, its errors, and beyond its limits."""

from __future__ import annotations

import warnings

import pytest
import torch

import funclsq as fl
from funclsq.compat import lsmr, sparse_generic_lstsq

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # made by the peer

F64 = torch.float64
INDEX = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3], [0, 0, 0, 0, 1, 1, 1, 2]])


def example(dtype=F64):
    """The 5 x 3 matrix with 8 entries of its documentation."""
    values = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.0], dtype=dtype)
    return coo(INDEX, values, (5, 3)).coalesce()


def coo(index, values, shape):
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True)


def dense_gradients(A, B, X_bar):
    """X, A_bar and B_bar by dense autodiff of the pseudo-inverse (any rank, real or complex)."""
    A = A.detach().to_dense().requires_grad_()
    B = B.detach().clone().requires_grad_()
    X = torch.linalg.pinv(A) @ B
    return X.detach(), *torch.autograd.grad(X, (A, B), X_bar)


def check(A, B, solve=sparse_generic_lstsq, rtol=1e-8):
    """X and all gradients, on the whole pattern, with a random cotangent."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    X = solve(A, B)
    X_bar = torch.randn_like(X)
    want, A_bar, B_bar = dense_gradients(A, B, X_bar)
    # not backward(): torch itself cannot accumulate into a CSC or BSR leaf
    A_grad, B_grad = torch.autograd.grad(X, (A, B), X_bar)
    torch.testing.assert_close(X.detach(), want, rtol=rtol, atol=rtol)
    torch.testing.assert_close(B_grad, B_bar, rtol=rtol, atol=rtol)
    assert A_grad.layout == A.layout
    mask = A.detach().to_dense() != 0
    torch.testing.assert_close(A_grad.to_dense(), A_bar * mask, rtol=rtol, atol=rtol)


# Its documentation


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4)])
def test_its_examples(shape):
    A, B = example(torch.float32), torch.randn(shape)
    X = sparse_generic_lstsq(A, B)
    assert X.shape == (3, *shape[1:])
    A.requires_grad_()
    sparse_generic_lstsq(A, B.requires_grad_()).sum().backward()
    assert A.grad.is_sparse
    assert A.grad._nnz() == 8
    assert B.grad.shape == shape


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4)])
def test_its_example_with_a_solver_of_ones_own(layout, shape):
    A = example().to_sparse(layout=layout)

    def tight(A_, B_):
        return lsmr(A_, B_, atol=1e-14, btol=1e-14)[0]

    check(A, torch.randn(shape, dtype=F64), lambda A, B: sparse_generic_lstsq(A, B, lstsq=tight))
    check(
        A,
        torch.randn(shape, dtype=F64),
        lambda A, B: sparse_generic_lstsq(A, B, tight, lambda A, G: tight(A.adjoint(), G)),
    )


def test_the_given_solvers_are_the_ones_called():
    calls = []

    def lstsq(A, B):
        calls.append(("lstsq", A.shape, B.shape, A.layout))
        return torch.linalg.lstsq(A.to_dense(), B).solution

    def transpose_lstsq(A, G):
        calls.append(("transpose", A.shape, G.shape, A.layout))
        return torch.linalg.pinv(A.to_dense().mH) @ G

    check(
        example(),
        torch.randn(5, 2, dtype=F64),
        lambda A, B: sparse_generic_lstsq(A, B, lstsq, transpose_lstsq),
    )
    assert calls[0] == ("lstsq", (5, 3), (5, 2), torch.sparse_coo)
    assert ("transpose", (5, 3), (3, 2), torch.sparse_coo) in calls


def test_its_errors():
    A, B = example(), torch.randn(5, dtype=F64)
    with pytest.raises(TypeError, match="sparse tensor"):
        sparse_generic_lstsq(A.to_dense(), B)
    with pytest.raises(TypeError, match="sparse tensor"):
        sparse_generic_lstsq([[1.0]], B)
    with pytest.raises(TypeError, match="dense"):
        sparse_generic_lstsq(A, A)
    with pytest.raises(TypeError, match="one dtype"):
        sparse_generic_lstsq(A, B.float())
    with pytest.raises(ValueError, match="5 rows"):
        sparse_generic_lstsq(A, B[:4])
    with pytest.raises(ValueError, match=r"\(m, k\)"):
        sparse_generic_lstsq(A, B[:, None, None])
    with pytest.raises(RuntimeError, match="lstsq failed: no luck") as caught:
        sparse_generic_lstsq(A, B, lstsq=lambda A, B: fail())
    assert isinstance(caught.value.__cause__, ArithmeticError)
    with pytest.raises(RuntimeError, match=r"must return shape \(3,\)"):
        sparse_generic_lstsq(A, B, lstsq=lambda A, B: B)
    with pytest.raises(RuntimeError, match="got NoneType"):
        sparse_generic_lstsq(A, B, lstsq=lambda A, B: None)
    X = sparse_generic_lstsq(
        A, B.requires_grad_(), transpose_lstsq=lambda A, G: torch.zeros(4, dtype=F64)
    )
    with pytest.raises(RuntimeError, match="transpose_lstsq must return shape"):
        X.sum().backward()


def fail():
    raise ArithmeticError("no luck")


# lsmr


def test_lsmr_call_shapes():
    A, b = torch.randn(9, 4, dtype=F64), torch.randn(9, dtype=F64)
    exact = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    tight = {"atol": 1e-13, "btol": 1e-13}
    for given in (
        lsmr(A, b, **tight),
        lsmr(A.to_sparse_csr(), b[:, None], **tight),
        lsmr(lambda v: A @ v, b, Armat=lambda u: A.T @ u, n=4, **tight),
        lsmr(A.matmul, b, A.T, 4, 0.0, 1e-13, 1e-13),
    ):
        x, iterations = given
        assert isinstance(iterations, int)
        torch.testing.assert_close(x, exact)
    X, _ = lsmr(A, torch.stack([b, 2 * b], 1), **tight)
    torch.testing.assert_close(X[:, 1], 2 * exact)
    x, iterations = lsmr(A, 0 * b)
    assert iterations == 0
    assert not x.any()


def test_lsmr_damp_and_start():
    A, b = torch.randn(3, 7, dtype=F64), torch.randn(3, dtype=F64)
    x0 = torch.randn(7, dtype=F64)
    x, _ = lsmr(A, b, x0=x0, atol=1e-14, btol=1e-14)
    torch.testing.assert_close(x, x0 + torch.linalg.pinv(A) @ (b - A @ x0))
    x, _ = lsmr(A, b, damp=0.5, atol=1e-14, btol=1e-14)
    torch.testing.assert_close(
        x, torch.linalg.solve(A.T @ A + 0.25 * torch.eye(7, dtype=F64), A.T @ b)
    )


def test_lsmr_errors():
    A, b = torch.randn(5, 3), torch.randn(5)
    with pytest.raises(RuntimeError, match="tensor or a function"):
        lsmr("A", b)
    with pytest.raises(RuntimeError, match="number of columns"):
        lsmr(A.matmul, b)
    with pytest.raises(RuntimeError, match="Armat"):
        lsmr(A.matmul, b, n=3)


# What peers get wrong


def scattered(m, n, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, dtype=dtype, generator=generator)
    keep = torch.rand(m, n, generator=generator) < 0.6
    keep[torch.arange(min(m, n)), torch.arange(min(m, n))] = True
    return A * keep


@pytest.mark.parametrize("k", [(), (3,)])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6), (1, 3), (3, 1)])
def test_every_shape_and_dtype(shape, dtype, k):
    check(scattered(*shape, dtype).to_sparse_coo(), torch.randn(shape[0], *k, dtype=dtype))


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr])
def test_every_layout(layout):
    block = (2, 2) if layout == torch.sparse_bsr else None
    A = torch.randn(8, 4, dtype=F64) if block else scattered(8, 4)
    check(A.to_sparse(layout=layout, blocksize=block), torch.randn(8, dtype=F64))


def test_rank_deficient():
    column = torch.randn(6, 1, dtype=F64)
    A = torch.cat([column, 2 * column, torch.randn(6, 1, dtype=F64)], 1)
    B = torch.randn(6, 2, dtype=F64)
    X_bar = torch.randn(3, 2, dtype=F64)
    S = A.to_sparse_coo().requires_grad_()
    X = sparse_generic_lstsq(S, B)
    X.backward(X_bar)
    # along directions that keep the rank, the derivative is that of the pseudo-inverse
    D = A @ torch.randn(3, 3, dtype=F64) + torch.randn(6, 6, dtype=F64) @ A

    def loss(t):
        return ((torch.linalg.pinv(A + t * D, rtol=1e-9) @ B) * X_bar).sum()

    h = 1e-6
    difference = (loss(h) - loss(-h)) / (2 * h)
    torch.testing.assert_close((S.grad.to_dense() * D).sum(), difference, rtol=1e-6, atol=1e-7)
    null = torch.tensor([[2.0, -1.0, 0.0]], dtype=F64).T.expand(3, 2)
    S.grad = None
    sparse_generic_lstsq(S, B).backward(null)
    assert S.grad.to_dense().abs().max() > 1e-2


def test_double_backward():
    b = torch.randn(5, dtype=F64, requires_grad=True)

    def f(values, b):
        return sparse_generic_lstsq(coo(INDEX, values, (5, 3)), b)

    values = (torch.rand(8, dtype=F64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(f, (values, b))
    assert torch.autograd.gradgradcheck(f, (values, b))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_second_derivative_in_the_sparse_tensor_itself(layout):
    """On the tensor: in values from which torch.sparse_coo_tensor made it, torch loses it."""
    A, b = scattered(7, 3), torch.randn(7, dtype=F64)
    x_bar, V = torch.randn(3, dtype=F64), torch.randn(7, 3, dtype=F64) * (A != 0)

    def second(A, b, solve):
        (A_bar,) = torch.autograd.grad(solve(A, b) @ x_bar, A, create_graph=True)
        dense = A_bar if A_bar.layout == torch.strided else A_bar.to_dense()
        return torch.autograd.grad((dense * V).sum(), (A, b))

    right = b.requires_grad_()
    got = second(A.to_sparse(layout=layout).requires_grad_(), right, sparse_generic_lstsq)
    want = second(A.clone().requires_grad_(), right, lambda A, b: torch.linalg.pinv(A) @ b)
    torch.testing.assert_close(got[0].to_dense(), want[0] * (A != 0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got[1], want[1], rtol=1e-9, atol=1e-9)


def test_repeated_entries_are_summed_each_with_its_gradient():
    index = torch.cat([INDEX, INDEX[:, :2]], 1)
    values = torch.rand(10, dtype=F64)
    A = coo(index, values, (5, 3)).requires_grad_()
    sparse_generic_lstsq(A, torch.arange(5.0, dtype=F64)).sum().backward()
    grad = A.grad._values()
    assert len(grad) == 10
    torch.testing.assert_close(grad[:2], grad[8:])


def test_graded_columns_with_default_tolerances():
    A = scattered(40, 8) * torch.logspace(0, -6, 8, dtype=F64)
    B = torch.randn(40, dtype=F64)
    x = sparse_generic_lstsq(A.to_sparse_csr(), B)
    torch.testing.assert_close(
        x, torch.linalg.lstsq(A, B[:, None]).solution[:, 0], rtol=1e-9, atol=0
    )


def test_what_does_not_converge_says_so():
    A = torch.randn(40, 20, dtype=F64).to_sparse_csr()
    with pytest.warns(fl.ConvergenceWarning):
        lsmr(A, torch.randn(40, dtype=F64), atol=1e-12, btol=1e-12, maxiter=3)
    with pytest.raises(ValueError, match="finite"):
        sparse_generic_lstsq(A, torch.full((40,), torch.nan, dtype=F64))


def test_one_row():
    A = coo(torch.tensor([[0, 0], [0, 2]]), torch.tensor([3.0, 4.0], dtype=F64), (1, 3))
    check(A.coalesce(), torch.tensor([5.0], dtype=F64))


# Side by side


@pytest.fixture(scope="module")
def theirs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("torchsparsegradutils")
        pytest.importorskip("torchsparsegradutils.utils")
    return module


def gradients(solve, A, B, X_bar, **given):
    A, B = A.detach().clone().requires_grad_(), B.detach().clone().requires_grad_()
    X = solve(A, B, **given)
    X.backward(X_bar)
    return X.detach(), A.grad.to_dense(), B.grad


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("k", [(), (4,)])
def test_equal_where_they_are_right(theirs, layout, k):
    A = scattered(12, 5).to_sparse(layout=layout)
    B, X_bar = torch.randn(12, *k, dtype=F64), torch.randn(5, *k, dtype=F64)
    ours = gradients(sparse_generic_lstsq, A, B, X_bar)
    other = gradients(theirs.sparse_generic_lstsq, A, B, X_bar)
    for a, b in zip(ours, other):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # their tolerance is 1e-6
    with_their_lsmr = gradients(
        sparse_generic_lstsq,
        A,
        B[..., 0] if k else B,
        X_bar[..., 0] if k else X_bar,
        lstsq=lambda A, B: theirs.utils.lsmr(A, B, atol=1e-13, btol=1e-13)[0],
    )
    exact = gradients(sparse_generic_lstsq, A, B[..., 0] if k else B, X_bar[..., 0] if k else X_bar)
    for a, b in zip(with_their_lsmr, exact):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    x, _ = lsmr(A, B[..., 0] if k else B)
    y, _ = theirs.utils.lsmr(A, B[..., 0] if k else B)
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def error_of(solve, A, B, X_bar):
    """Relative error of A_bar against dense autodiff."""
    _, A_bar, _ = dense_gradients(A, B, X_bar)
    _, got, _ = gradients(solve, A, B, X_bar)
    want = A_bar * (A.to_dense() != 0)
    return float(torch.linalg.norm(got - want) / torch.linalg.norm(want))


def test_ours_right_where_theirs_is_silently_wrong(theirs):
    tall, B, X_bar = scattered(12, 5), torch.randn(12, dtype=F64), torch.randn(5, dtype=F64)
    damped = torch.cat([tall, 0.7 * torch.eye(5, dtype=F64)])

    def with_damping(A, B):
        return theirs.sparse_generic_lstsq(
            A, B, lstsq=lambda A, B: theirs.utils.lsmr(A, B, damp=0.7, atol=1e-13, btol=1e-13)[0]
        )

    S = tall.to_sparse_coo()
    padded = torch.cat([B, torch.zeros(5, dtype=F64)])
    _, A_bar, _ = dense_gradients(damped, padded, X_bar)
    want = A_bar[:12] * (tall != 0)
    _, got, _ = gradients(with_damping, S, B, X_bar)
    _, ours, _ = gradients(lambda A, B: fl.lstsq(A, B, damp=0.7), S, B, X_bar)
    assert torch.linalg.norm(got - want) > 1e-2 * torch.linalg.norm(want)
    assert torch.linalg.norm(ours - want) < 1e-10 * torch.linalg.norm(want)

    C = scattered(12, 5, torch.complex128).to_sparse_coo()
    given = (C, torch.randn(12, dtype=C.dtype), torch.randn(5, dtype=C.dtype))
    assert error_of(theirs.sparse_generic_lstsq, *given) > 1e-2
    assert error_of(sparse_generic_lstsq, *given) < 1e-9

    graded = (tall * torch.logspace(0, -6, 5, dtype=F64)).to_sparse_coo()
    exact = torch.linalg.lstsq(graded.to_dense(), B[:, None]).solution[:, 0]
    for solve, good in ((theirs.sparse_generic_lstsq, False), (sparse_generic_lstsq, True)):
        error = torch.linalg.norm(solve(graded, B) - exact) / torch.linalg.norm(exact)
        assert bool(error < 1e-8) == good


def test_ours_right_on_deficient_matrices_where_theirs_is_silently_wrong(theirs):
    column = torch.randn(6, 1, dtype=F64)
    A = torch.cat([column, 2 * column, torch.randn(6, 1, dtype=F64)], 1)
    B, X_bar = torch.randn(6, dtype=F64), torch.randn(3, dtype=F64)
    D = A @ torch.randn(3, 3, dtype=F64) + torch.randn(6, 6, dtype=F64) @ A  # keeps the rank
    h = 1e-6
    ahead, behind = (torch.linalg.pinv(A + t * D, rtol=1e-9) @ B @ X_bar for t in (h, -h))
    want = float(ahead - behind) / (2 * h)
    errors = []
    for solve in (theirs.sparse_generic_lstsq, sparse_generic_lstsq):
        X, A_bar, _ = gradients(solve, A.to_sparse_coo(), B, X_bar)
        torch.testing.assert_close(X, torch.linalg.pinv(A) @ B, rtol=1e-4, atol=1e-4)
        errors.append(abs(float((A_bar * D).sum()) - want) / abs(want))
    assert errors[0] > 1e-2
    assert errors[1] < 1e-6


def test_ours_keeps_a_gradient_penalty_that_theirs_silently_loses(theirs):
    b = torch.randn(5, dtype=F64)

    def slope_of_loss(solve):
        """Of ||d sum(x) / d b||^2 + ||A||^2, a penalty beside weight decay, in A's entries."""
        values = example(F64).values().clone().requires_grad_()
        right = b.clone().requires_grad_()
        A = coo(example(F64).indices(), values, (5, 3)).coalesce()
        (g,) = torch.autograd.grad(solve(A, right).sum(), right, create_graph=True)
        return torch.autograd.grad((g**2).sum() + (values**2).sum(), values)[0]

    def by_pinv(A, b):
        return torch.linalg.pinv(A.to_dense()) @ b

    want, decay = slope_of_loss(by_pinv), 2 * example(F64).values()
    torch.testing.assert_close(slope_of_loss(sparse_generic_lstsq), want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(slope_of_loss(theirs.sparse_generic_lstsq), decay)
    assert torch.linalg.norm(want - decay) > 0.1 * torch.linalg.norm(want)


def test_ours_works_where_theirs_raises(theirs):
    wide = scattered(5, 12).to_sparse_coo()
    B, X_bar = torch.randn(5, dtype=F64), torch.randn(12, dtype=F64)
    with pytest.raises(ValueError, match="tall"):
        gradients(theirs.sparse_generic_lstsq, wide, B, X_bar)
    assert error_of(sparse_generic_lstsq, wide, B, X_bar) < 1e-9

    index = torch.cat([INDEX, INDEX[:, :2]], 1)
    repeated = coo(index, torch.rand(10, dtype=F64), (5, 3))
    X_bar = torch.randn(3, dtype=F64)
    with pytest.raises(RuntimeError):
        gradients(theirs.sparse_generic_lstsq, repeated, B, X_bar)
    gradients(sparse_generic_lstsq, repeated, B, X_bar)


def test_ours_says_so_where_theirs_is_silent(theirs):
    """[first differences; 1e-3 I]: cond 4e3, and min(m, n) steps are not enough."""
    n = 300
    D = torch.eye(n, dtype=F64) - torch.diag(torch.ones(n - 1, dtype=F64), -1)
    A = torch.cat([D, 1e-3 * torch.eye(n, dtype=F64)]).to_sparse_csr()
    b = torch.randn(2 * n, dtype=F64)
    exact = torch.linalg.lstsq(A.to_dense(), b[:, None]).solution[:, 0]
    theirs_error = torch.linalg.norm(theirs.utils.lsmr(A, b, maxiter=100)[0] - exact)
    assert theirs_error > 1e-2 * torch.linalg.norm(exact)
    with pytest.warns(fl.ConvergenceWarning):
        lsmr(A, b, maxiter=100)
    assert torch.linalg.norm(sparse_generic_lstsq(A, b) - exact) < 1e-9 * torch.linalg.norm(exact)
