"""Derivatives of first and second order, in every operand, agree with a dense oracle."""

from __future__ import annotations

import contextlib
import inspect

import mpmath
import numpy as np
import pytest
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    PROBLEMS,
    SOLVERS,
    as_tensors,
    function,
    leaves,
    operands,
    problem,
)
from oracle import CURVATURE, _answers, bases, check, closed_form, loss, reference

import funclsq as fl
from funclsq import derivatives, matrix

# The rank of these may not change, so derivatives are compared along the set of constant rank.
DEFICIENT = [
    n for n in PROBLEMS if not problem(n).open or problem(n).rank < min(problem(n).A.shape)
]


# Layouts that torch can put into .grad at all: for others .backward() of any function fails.
_ACCUMULATED = (torch.strided, torch.sparse_coo, torch.sparse_csr)


def _loss(ref, layout="sparse", **options):
    """The reference's loss as a function of the operands."""
    f = function(ref.problem, layout, **options)
    return lambda *p: loss(f(*p), ref.cotangent)


def _check_operands(ref, got, want, layout, what):
    chosen = LAYOUTS[layout]
    for name, bar in zip(ref.problem.names, got):
        pull = None
        if name == "A":
            pull = lambda t: chosen.pull(t, ref.problem.stored)  # noqa: E731
            if bar.layout != torch.strided:
                bar, dense = _stored_values(bar), pull
                pull = lambda t, dense=dense: _stored_values(dense(t))  # noqa: E731
        check(bar, want[name], f"{what} of {name}", pull)


def _stored_values(A):
    return A._values() if A.layout == torch.sparse_coo else A.values()


# ---------------------------------------------------------------------------------------------
# First order.


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients(name, dtype, layout):
    ref = reference(name, DTYPES[dtype])
    p = [t.requires_grad_() for t in operands(ref.problem, DTYPES[dtype], layout)]
    value = _loss(ref, layout)(*p)
    check(value.detach(), ref.loss, "loss")
    _check_operands(ref, torch.autograd.grad(value, p), ref.grad, layout, "gradient")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_gradients_by_every_solver(name, solver):
    if (name, solver) == ("graded", "svd"):
        pytest.skip("svd sees the units of the columns")
    ref = reference(name, torch.float64)
    p = [t.requires_grad_() for t in operands(ref.problem, torch.float64)]
    bars = torch.autograd.grad(_loss(ref, solver=solver)(*p), p)
    _check_operands(ref, bars, ref.grad, "sparse", "gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [n for n in LAYOUTS if LAYOUTS[n].differentiable])
@pytest.mark.parametrize("name", ["tall_vector", "wide", "deficient_tall", "everything", "empty"])
def test_gradients_come_back_in_the_layout_of_A(name, layout, dtype):
    ref = reference(name, DTYPES[dtype])
    p = [t.requires_grad_() for t in operands(ref.problem, DTYPES[dtype], layout)]
    bars = torch.autograd.grad(_loss(ref, layout)(*p), p)
    assert (bars[0].layout, bars[0].dtype) == (p[0].layout, p[0].dtype)
    _check_operands(ref, bars, ref.grad, layout, "gradient")
    if p[0].layout in _ACCUMULATED:
        _loss(ref, layout)(*p).backward()
        assert p[0].grad.layout == p[0].layout
        _check_operands(ref, [t.grad for t in p], ref.grad, layout, "gradient")


@pytest.mark.parametrize("layout", ["scipy", "numpy"])
def test_a_matrix_without_gradient_leaves_those_of_the_rest(layout):
    ref = reference("everything", torch.float64)
    A, *rest = operands(ref.problem, torch.float64, layout)
    rest = [t.requires_grad_() for t in rest]
    bars = torch.autograd.grad(_loss(ref, layout)(A, *rest), rest)
    for name, bar in zip(ref.problem.names[1:], bars):
        check(bar, ref.grad[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_tangents(name, dtype):
    ref = reference(name, DTYPES[dtype])
    f = function(ref.problem)
    p = operands(ref.problem, DTYPES[dtype])
    x, x_dot = torch.func.jvp(f, p, leaves(ref.problem, ref.along))
    check(x, ref.x, "x")
    check(x_dot, ref.jvp, "tangent")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_tangents_by_every_solver_and_functional_layout(name, solver):
    ref = reference(name, torch.float64)
    for layout in (n for n in LAYOUTS if LAYOUTS[n].functional):
        if layout.startswith("matrix_free") and solver in ("qr", "svd", "cholesky"):
            continue
        f = function(ref.problem, layout, solver=solver)
        p = operands(ref.problem, torch.float64, layout)
        along = leaves(ref.problem, ref.along, layout)
        check(torch.func.jvp(f, p, along)[1], ref.jvp, f"tangent ({layout})")


def test_a_cotangent_in_the_null_space_moves_A_alone():
    ref = reference("deficient_tall", torch.float64)
    A, b = ref.data["A"], ref.data["b"]
    null = torch.linalg.svd(A).Vh[3:].mT
    k = null @ torch.randn(2, 2, dtype=torch.float64)
    for layout in ("dense", "sparse"):
        p = [t.requires_grad_() for t in operands(ref.problem, torch.float64, layout)]
        A_bar, b_bar = torch.autograd.grad(function(ref.problem, layout)(*p), p, k)
        inverse = torch.linalg.pinv(A, rtol=1e-10)
        want = inverse.mT @ (inverse @ b) @ k.mT
        assert torch.linalg.vector_norm(want) > 0.1
        pulled = LAYOUTS[layout].pull(want, ref.problem.stored)
        torch.testing.assert_close(A_bar, pulled, rtol=1e-12, atol=1e-13)
        assert torch.linalg.vector_norm(b_bar) < 1e-13


def test_a_gradient_where_damp_or_a_weight_is_zero_is_finite():
    for name in ("damp_zero_tensor", "weighted_zeros", "weighted_columns"):
        p = [t.requires_grad_() for t in operands(problem(name), torch.float64)]
        bars = torch.autograd.grad(function(problem(name))(*p).square().sum(), p, create_graph=True)
        for bar in (*bars, *torch.autograd.grad(sum(t.square().sum() for t in bars), p)):
            assert torch.isfinite(bar).all()


@pytest.mark.parametrize("name", ["tall", "everything", "deficient_tall"])
def test_every_operand_alone(name):
    ref = reference(name, torch.float64)
    for at, operand in enumerate(ref.problem.names):
        p = list(operands(ref.problem, torch.float64))
        p[at] = p[at].clone().requires_grad_()
        (bar,) = torch.autograd.grad(_loss(ref)(*p), p[at])
        pull = (lambda t: LAYOUTS["sparse"].pull(t, ref.problem.stored)) if at == 0 else None
        check(bar, ref.grad[operand], operand, pull)


@pytest.mark.parametrize("rank", ["full", 4])
def test_a_known_full_rank_changes_no_derivative(rank):
    ref = reference("tall", torch.float64)
    p = [t.requires_grad_() for t in operands(ref.problem, torch.float64)]
    bars = torch.autograd.grad(_loss(ref, rank=rank)(*p), p)
    _check_operands(ref, bars, ref.grad, "sparse", "gradient")


@pytest.mark.parametrize("solver", ["auto", "qr", "svd"])
def test_a_rank_given_as_a_number_gives_the_derivatives_of_that_rank(solver):
    ref = reference("deficient_tall", torch.float64)
    p = [t.requires_grad_() for t in operands(ref.problem, torch.float64)]
    bars = torch.autograd.grad(_loss(ref, rank=3, solver=solver)(*p), p)
    _check_operands(ref, bars, ref.grad, "sparse", "gradient")


def test_broadcast_operands_collect_the_gradients_of_their_copies():
    data = problem("tall").tensors(torch.float64)
    A, b = data["A"], data["b"]
    x0 = torch.randn(4, dtype=torch.float64, requires_grad=True)
    w = torch.rand(7, 1, dtype=torch.float64, requires_grad=True)
    damp = torch.rand(1, dtype=torch.float64, requires_grad=True)
    c = torch.randn(4, 2, dtype=torch.float64)
    got = torch.autograd.grad(
        (c * fl.lstsq(A, b, x0=x0, weights=w, damp=damp)).sum(), (x0, w, damp)
    )
    full = [
        x0.detach()[:, None].repeat(1, 2).requires_grad_(),
        w.detach().repeat(1, 2).requires_grad_(),
        damp.detach().repeat(4).requires_grad_(),
    ]
    x = fl.lstsq(A, b, x0=full[0], weights=full[1], damp=full[2])
    want = torch.autograd.grad((c * x).sum(), full)
    for bar, copies, dim in zip(got, want, (1, 1, 0)):
        total = copies.sum(dim).reshape(bar.shape)
        torch.testing.assert_close(bar, total, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# Second order: four ways, of which two need a symmetric Hessian.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_hessian_vector_products_forward_over_reverse(name, dtype):
    ref = reference(name, DTYPES[dtype])
    p = operands(ref.problem, DTYPES[dtype])
    gradient = torch.func.grad(_loss(ref), argnums=tuple(range(len(p))))
    along = leaves(ref.problem, ref.along)
    grad, hvp = torch.func.jvp(gradient, p, along)
    _check_operands(ref, grad, ref.grad, "sparse", "gradient")
    _check_operands(ref, hvp, ref.hvp, "sparse", "hvp")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_hessian_vector_products_by_every_solver(name, solver):
    ref = reference(name, torch.float64)
    p = operands(ref.problem, torch.float64)
    gradient = torch.func.grad(_loss(ref, solver=solver), argnums=tuple(range(len(p))))
    _, hvp = torch.func.jvp(gradient, p, leaves(ref.problem, ref.along))
    _check_operands(ref, hvp, ref.hvp, "sparse", "hvp")


@pytest.mark.parametrize("layout", ["dense", "matrix_free", "matrix_free_adjoint", "repeated"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_hessian_vector_products_in_every_functional_layout(name, layout):
    ref = reference(name, torch.float64)
    p = operands(ref.problem, torch.float64, layout)
    gradient = torch.func.grad(_loss(ref, layout), argnums=tuple(range(len(p))))
    _, hvp = torch.func.jvp(gradient, p, leaves(ref.problem, ref.along, layout))
    _check_operands(ref, hvp, ref.hvp, layout, "hvp")


def _inner(a, b):
    return sum((s.conj() * t).real.sum() for s, t in zip(a, b))


def _check_symmetric(ref, got):
    """Compare a Hessian times ``along``: whole where the Hessian is one, else along the set."""
    want, name = ref.hvp, ref.problem.name
    if name not in DEFICIENT:
        _check_operands(ref, got, want, "sparse", "hvp")
        return
    rng = np.random.default_rng(17)
    for _ in range(3):
        direction = as_tensors(ref.problem.tangent(rng), ref.dtype)
        size = max(float(torch.linalg.vector_norm(t)) for t in direction.values())
        tolerance = size * sum(w.tolerance for w in want.values())
        value = sum((w.value.conj() * direction[n]).real.sum() for n, w in want.items())
        assert abs(_inner(got, leaves(ref.problem, direction)) - value) <= tolerance


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_hessian_vector_products_reverse_over_reverse(name, dtype):
    ref = reference(name, DTYPES[dtype])
    p = [t.requires_grad_() for t in operands(ref.problem, DTYPES[dtype])]
    bars = torch.autograd.grad(_loss(ref)(*p), p, create_graph=True)
    slope = _inner(leaves(ref.problem, ref.along), bars)
    if slope.requires_grad:
        hvp = torch.autograd.grad(slope, p, allow_unused=True, materialize_grads=True)
        _check_symmetric(ref, hvp)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_hessian_vector_products_reverse_over_forward(name, dtype):
    ref = reference(name, DTYPES[dtype])
    p, along = operands(ref.problem, DTYPES[dtype]), leaves(ref.problem, ref.along)

    def slope(*q):
        return torch.func.jvp(_loss(ref), q, along)[1]

    _check_symmetric(ref, torch.func.grad(slope, argnums=tuple(range(len(p))))(*p))


def _twice_forward(ref, layout="sparse", **options):
    f = function(ref.problem, layout, **options)
    p = operands(ref.problem, ref.dtype, layout)
    along = leaves(ref.problem, ref.along, layout)
    other = leaves(ref.problem, ref.other, layout)
    push = lambda *q: torch.func.jvp(f, q, other)[1]  # noqa: E731
    return torch.func.jvp(push, p, along)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_second_tangents_forward_over_forward(name, dtype):
    ref = reference(name, DTYPES[dtype])
    check(_twice_forward(ref), ref.second, "second tangent")


@pytest.mark.parametrize("layout", ["dense", "matrix_free", "matrix_free_adjoint"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_second_tangents_in_every_functional_layout(name, layout):
    ref = reference(name, torch.float64)
    check(_twice_forward(ref, layout), ref.second, "second tangent")


@pytest.mark.parametrize("name", ["tall", "deficient_tall"])
def test_without_reenabling_forward_mode_nested_tangents_would_be_wrong(name, monkeypatch):
    """Trap: torch runs a jvp rule with forward mode off, and nests wrongly without a word."""
    ref = reference(name, torch.float64)
    check(_twice_forward(ref), ref.second, "second tangent")
    for module in (derivatives, matrix):
        monkeypatch.setattr(module, "nested_forward_mode", contextlib.nullcontext)
    lost = torch.linalg.vector_norm(_twice_forward(ref) - ref.second.value)
    assert lost > 1e-3 * torch.linalg.vector_norm(ref.second.value)


def test_only_x_of_a_solution_is_differentiable():
    A, b = (t.requires_grad_() for t in operands(problem("tall"), torch.float64, "dense"))
    solution = fl.solve(A, b)
    assert solution.x.requires_grad
    for name in ("status", "iterations", "residual_norm", "normal_residual_norm", "rank", "cond"):
        assert not getattr(solution, name).requires_grad


# ---------------------------------------------------------------------------------------------
# torch's own checks, which know nothing of least squares.


def _rank_two(B, b, x0):
    """A rank-deficient A by construction, so that every direction keeps the rank."""
    C = torch.tensor([[1.0, 0.5, 0, 2], [0, -1, 1, 1]], dtype=torch.float64)
    return fl.lstsq(B @ C, b, x0=x0)


def _sparse_and_damped(values, b, damp, weights):
    S = fl.SparsityPattern([0, 1, 2, 2, 3, 3], [0, 1, 0, 2, 1, 2], (4, 3))
    return fl.lstsq(fl.Sparse(S, values), b, damp=damp, weights=weights)


def _inputs(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return tuple(
        (0.2 + torch.rand(s, generator=generator, dtype=dtype)).requires_grad_() for s in shapes
    )


CHECKED = {
    "tall": (lambda A, b: fl.lstsq(A, b), _inputs((4, 2), (4,))),
    "wide": (lambda A, b: fl.lstsq(A, b), _inputs((2, 3), (2, 1))),
    "complex": (lambda A, b: fl.lstsq(A, b), _inputs((3, 2), (3,), dtype=torch.complex128)),
    "deficient": (_rank_two, _inputs((4, 2), (4,), (4,))),
    "damped": (_sparse_and_damped, _inputs((6,), (4,), (), (4,))),
    "batch": (lambda A, b: fl.lstsq(A, b), _inputs((2, 3, 2), (3, 2))),
}


@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name):
    f, inputs = CHECKED[name]
    assert torch.autograd.gradcheck(
        f,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        check_undefined_grad=True,
    )


@pytest.mark.parametrize("name", CHECKED)
def test_gradgradcheck(name):
    f, inputs = CHECKED[name]
    assert torch.autograd.gradgradcheck(
        f,
        inputs,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=name != "complex",
    )


# ---------------------------------------------------------------------------------------------
# Batches.


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall"])
def test_derivatives_of_a_batch_are_those_of_its_members(name, layout):
    p = problem(name)
    chosen = LAYOUTS[layout]
    rng = np.random.default_rng(8)
    points = [{n: t + 0 for n, t in p.tensors(torch.float64).items()} for _ in range(3)]
    for i, point in enumerate(points):
        point["A"] = point["A"] * (1 + i)
        point["b"] = torch.from_numpy(rng.standard_normal(p.b.shape))
    directions = [as_tensors(p.tangent(rng), torch.float64) for _ in points]
    f = function(p, layout)
    c = torch.randn(3, *p.A.shape[1:], 2, dtype=torch.float64)

    def stacked(members):
        return tuple(map(torch.stack, zip(*(leaves(p, m, layout) for m in members))))

    def answers(q, v, c):
        gradient = torch.func.grad(lambda *q: loss(f(*q), c), argnums=(0, 1))
        return (*torch.func.jvp(f, q, v), *torch.func.jvp(gradient, q, v))

    whole = answers(stacked(points), stacked(directions), c)
    alone = [
        answers(leaves(p, q, layout), leaves(p, v, layout), cj)
        for q, v, cj in zip(points, directions, c)
    ]
    flat = torch.utils._pytree.tree_leaves
    for got, *want in zip(flat(whole), *map(flat, alone)):
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-9, atol=1e-10)
    assert chosen.functional


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_one_matrix_for_a_batch_of_right_hand_sides_collects_their_gradients(layout):
    ref = reference("deficient_tall", torch.float64)
    p = ref.problem
    A, b = operands(p, torch.float64, layout)
    many = torch.stack((b, 2 * b, torch.randn_like(b)))
    c = torch.randn(3, 5, 2, dtype=torch.float64)
    f = function(p, layout)
    got = torch.func.grad(lambda A: (c * f(A, many)).sum())(A)
    want = sum(torch.func.grad(lambda A, i=i: (c[i] * f(A, many[i])).sum())(A) for i in range(3))
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_members_of_a_batch_that_differ_in_rank_each_get_their_own_terms():
    p = problem("deficient_tall")
    low = torch.from_numpy(p.A)
    full = low + torch.randn(low.shape, dtype=torch.float64) * torch.from_numpy(p.stored)
    values = LAYOUTS["sparse"].leaf(torch.stack((low, full)), p.stored)
    b, c = torch.randn(2, 8, 2, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    f = function(p)

    def gradient(values, b, c):
        return torch.func.grad(lambda *q: (c * f(*q)).sum(), argnums=(0, 1))(values, b)

    whole = gradient(values, b, c)
    for i in range(2):
        for got, want in zip(whole, gradient(values[i], b[i], c[i])):
            torch.testing.assert_close(got[i], want, rtol=1e-10, atol=1e-11)


# ---------------------------------------------------------------------------------------------
# Ill-conditioned problems, against 60 digits.


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky"])
def test_gradients_of_an_ill_conditioned_problem(solver):
    cond = 1e5
    rng = np.random.default_rng(6)
    U, _ = np.linalg.qr(rng.standard_normal((9, 4)))
    V, _ = np.linalg.qr(rng.standard_normal((4, 4)))
    A = (U * np.geomspace(1, 1 / cond, 4)) @ V.T
    b, k = rng.standard_normal(9), rng.standard_normal(4)
    with mpmath.workdps(60):
        M, v, g = (mpmath.matrix(t.tolist()) for t in (A, b, k))
        inverse = (M.T * M) ** -1
        x, z = inverse * (M.T * v), inverse * g
        A_bar = (v - M * x) * z.T - (M * z) * x.T
        want = [np.array(t.tolist(), dtype=float) for t in (A_bar, (M * z).T)]
    p = [torch.from_numpy(t).requires_grad_() for t in (A, b)]
    got = torch.autograd.grad(fl.lstsq(*p, solver=solver), p, torch.from_numpy(k))
    for bar, exact in zip(got, want):
        error = np.linalg.norm(bar.numpy() - exact)
        assert error <= 100 * np.finfo(float).eps * cond * np.linalg.norm(exact)


# ---------------------------------------------------------------------------------------------
# The oracle itself, held against differences of an exact formula at 50 digits.


def _curve(p, direction, rng):
    """A(t) = (1 + t P)(B + t dB) C (1 + t Q), its A'(0) and A''(0); of constant rank."""
    B, C = p.factors if p.factors else (p.A, np.eye(p.A.shape[1]))
    P, Q = np.diag(rng.standard_normal(p.A.shape[0])), np.diag(rng.standard_normal(p.A.shape[1]))
    dB = rng.standard_normal(B.shape) * (B != 0)
    first = P @ B @ C + dB @ C + B @ C @ Q
    second = 2 * (P @ dB @ C + P @ B @ C @ Q + dB @ C @ Q)
    return (P, B, dB, C, Q), first, second


def _exact_minimiser(parts, b, db, x0, dx0, t):
    P, B, dB, C, Q = (mpmath.matrix(u.tolist()) for u in parts)
    b, db, x0, dx0 = (mpmath.matrix(u.tolist()) for u in (b, db, x0, dx0))
    left = (mpmath.eye(P.rows) + t * P) * (B + t * dB)
    right = C * (mpmath.eye(Q.rows) + t * Q)
    b, x0 = b + t * db, x0 + t * dx0
    y = (left.H * left) ** -1 * (left.H * (b - left * (right * x0)))
    return x0 + right.H * ((right * right.H) ** -1 * y)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("name", ["tall", "started_deficient", "deficient_wide"])
def test_the_oracle_agrees_with_differences_at_50_digits(name, complex_):
    p = problem(name, complex_)
    rng = np.random.default_rng(2)
    dtype = torch.complex128 if complex_ else torch.float64
    direction = p.tangent(rng)
    parts, first, second = _curve(p, direction, rng)
    direction["A"] = first
    x0, dx0 = (d.get("x0", np.zeros((p.A.shape[1], 2))) for d in ({"x0": p.x0}, direction))
    x0 = np.zeros((p.A.shape[1], 2)) if x0 is None else x0
    with mpmath.workdps(50):
        h = mpmath.mpf(10) ** -15
        at = [_exact_minimiser(parts, p.b, direction["b"], x0, dx0, t * h) for t in (-1, 0, 1)]
        exact = [at[1], (at[2] - at[0]) / (2 * h), (at[2] - 2 * at[1] + at[0]) / h**2]
        x, x_dot, x_ddot = (np.array(t.tolist(), dtype=complex) for t in exact)
    data, along = p.tensors(dtype), as_tensors(direction, dtype)
    c = torch.randn(p.A.shape[1], 2, dtype=dtype)
    R = bases(data, p.rank)
    automatic = p.rank == min(p.A.shape)
    got = _answers({"p": data, "c": c, "along": along, "other": along, "R": R}, automatic)
    np.testing.assert_allclose(got["x"].numpy(), x, rtol=0, atol=1e-11)
    np.testing.assert_allclose(got["jvp"].numpy(), x_dot, rtol=0, atol=1e-10)
    # d^2/dt^2 x(A(t)) = D^2 x [A', A'] + D x [A'']; A'' may leave the set of constant rank.
    bent = np.zeros(x.shape, dtype=complex)
    for index in np.ndindex(*x.shape):
        for unit in (1.0, 1j) if complex_ else (1.0,):
            e = torch.zeros(x.shape, dtype=dtype)
            e[index] = unit
            bar = closed_form(data, R, e)["A"].numpy()
            bent[index] += unit * (bar.conj() * second).real.sum()
    np.testing.assert_allclose(got["second"].numpy() + bent, x_ddot, rtol=0, atol=1e-8)
    # The gradient's slope along the curve, by the same second differences, for <c, x>.
    slope = sum((got["grad"][n].conj() * along[n]).real.sum() for n in p.names)
    k = c + CURVATURE * got["x"]
    np.testing.assert_allclose(slope, (k.numpy().conj() * x_dot).real.sum(), atol=1e-10)


def test_no_call_works_out_a_signature(monkeypatch):
    A, b = torch.randn(8, 3, dtype=torch.float64, requires_grad=True), torch.randn(8).double()

    def call():
        fl.lstsq(A, b).sum().backward()
        fl.lstsq(A.detach().to_sparse_csr().requires_grad_(), b).sum().backward()

    call()  # what is imported on first use looks at its own functions
    asked = []
    inner = inspect._signature_from_function
    monkeypatch.setattr(
        inspect, "_signature_from_function", lambda *a, **k: asked.append(a) or inner(*a, **k)
    )
    inspect.signature(lambda x: x)
    assert len(asked) == 1  # what torch would call in every solve
    call()
    assert len(asked) == 1


@pytest.mark.parametrize("lead", [(), (3,)])
def test_single_columns_are_laid_one_after_the_other(lead):
    """They are copied in one piece, and taken apart again without a copy."""
    a, b = torch.randn(*lead, 5, 1), torch.randn(5, 1)
    both = derivatives._columns([a, b])
    assert torch.equal(both, torch.cat([a, b.expand_as(a)], -1)) and both.mT.is_contiguous()
    wide = derivatives._columns([a, torch.randn(5, 2)])
    assert wide.shape == (*lead, 5, 3) and wide.is_contiguous()
