"""A wrong derivative rule does not pass: every mutant of the rules is found.

The judge shares nothing with the rules: first derivatives are held against central differences
of the solution, second ones against central differences of first ones.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.func import jvp, vjp

import funclsq as fl
from funclsq import matrix
from funclsq.operators import SparseStructure

REAL, COMPLEX = torch.float64, torch.complex128
STEP, TOLERANCE = 1e-4, 2e-4


def _randn(g, *shape, dtype=REAL):
    return torch.randn(shape, generator=g, dtype=dtype)


def _sparse(dtype, m, n, weighted=True):
    g = torch.Generator().manual_seed(m)
    keep = torch.rand(m, n, generator=g) < 0.8
    pattern = fl.SparsityPattern(*keep.nonzero().T, (m, n))
    args = [
        _randn(g, pattern.nnz, dtype=dtype),
        _randn(g, m, 2, dtype=dtype),
        torch.rand(m, generator=g, dtype=REAL) + 0.5,
        torch.tensor(0.7, dtype=REAL),
        _randn(g, n, 2, dtype=dtype),
    ]

    def f(values, b, w, damp, x0):
        return fl.lstsq(fl.Sparse(pattern, values), b, weights=w, damp=damp, x0=x0, solver="svd")

    def unweighted(values, b, damp):
        return fl.lstsq(fl.Sparse(pattern, values), b, damp=damp, solver="svd")

    return (f, args) if weighted else (unweighted, [args[0], args[1], args[3]])


def _deficient(dtype, layout="sparse", solver="svd", damp=0.0):
    """Of rank 2, or of rank 3 with the first column damped."""
    g = torch.Generator().manual_seed(5)
    m, n, rank = 6, 4, 2
    args = [
        _randn(g, m, rank, dtype=dtype),
        _randn(g, rank, n, dtype=dtype),
        _randn(g, m, 1, dtype=dtype),
        torch.rand(m, generator=g, dtype=REAL) + 0.5,
    ]
    pattern = fl.SparsityPattern(*torch.ones(m, n).nonzero().T, (m, n))

    def f(left, right, b, w, damp=damp):
        A = left @ right
        A = fl.Sparse(pattern, A.flatten()) if layout == "sparse" else A
        if isinstance(damp, torch.Tensor):
            damp = torch.cat((damp, damp.new_zeros(n - 1)))
        return fl.lstsq(A, b, weights=w, damp=damp, solver=solver)

    if damp:
        args.append(torch.tensor([damp], dtype=REAL))

    return f, args


def _cases():
    """Functions, their arguments, and whether second derivatives are judged too."""
    yield *_deficient(COMPLEX, "dense", "lsmr", 0.7), False
    yield *_deficient(COMPLEX, "dense", "qr", 0.7), False
    yield *_deficient(COMPLEX), True
    yield *_sparse(COMPLEX, 6, 3), True
    yield *_sparse(COMPLEX, 3, 5), True  # wide: one damping for all, and s as one unknown
    yield *_sparse(COMPLEX, 3, 5, weighted=False), True


def _inner(a, b):
    return sum((x.conj() * y).real.sum() for x, y in zip(a, b, strict=True))


def _close(got, want):
    assert (got - want).abs() <= TOLERANCE * (want.abs() + 0.1), (got, want)


def judge():
    """Hold first and second derivatives against differences."""
    for f, args, second in _cases():
        g = torch.Generator().manual_seed(11)
        k = _randn(g, *f(*args).shape, dtype=f(*args).dtype)
        for slot in range(len(args)):
            along = [torch.zeros_like(a) for a in args]
            along[slot] = _randn(g, *args[slot].shape, dtype=args[slot].dtype)
            ahead, behind = ([a + sign * STEP * t for a, t in zip(args, along)] for sign in (1, -1))
            slope = (f(*ahead) - f(*behind)) / (2 * STEP)
            x_dot = jvp(f, tuple(args), tuple(along))[1]
            _close(_inner([k], [x_dot]), _inner([k], [slope]))
            _close(x_dot.abs().sum(), slope.abs().sum())

            def pulled(*a, f=f, k=k):
                return vjp(f, *a)[1](k)

            bars = pulled(*args)
            _close(_inner(bars, along), _inner([k], [slope]))
            if not second:
                continue
            differences = [
                (p - q) / (2 * STEP) for p, q in zip(pulled(*ahead), pulled(*behind), strict=True)
            ]
            probe = [_randn(g, *a.shape, dtype=a.dtype) for a in args]
            want = _inner(probe, differences)
            _close(_inner(probe, jvp(pulled, tuple(args), tuple(along))[1]), want)
            turned = vjp(pulled, *args)[1](tuple(probe))
            _close(_inner(turned, along), want)

            def pushed(*a, f=f, along=along):
                return jvp(f, a, tuple(along))[1]

            bend = (pushed(*ahead) - pushed(*behind)) / (2 * STEP)
            twice = jvp(pushed, tuple(args), tuple(along))[1]
            _close(_inner([k], [twice]), _inner([k], [bend]))


@pytest.mark.parametrize("cond", [1e6, 1e10])
@pytest.mark.parametrize("damp", [0.0, 1e-4])
@pytest.mark.filterwarnings("ignore::funclsq.AccuracyWarning")  # the loss is what is bounded here
def test_the_null_space_is_met_to_eps_cond(damp, cond):
    """At cond 1e6 one projection leaves 1e-4 of the range in the term across the null space."""
    g = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(_randn(g, k, k, dtype=COMPLEX))[0] for k in (9, 6))
    U, s = U[:, :4], cond ** -torch.linspace(0, 1, 4, dtype=REAL)
    if damp:  # of one right singular vector only, so that damping leaves the rank as it is
        V = torch.block_diag(torch.ones(1, 1, dtype=COMPLEX), torch.linalg.qr(V[1:, 1:])[0])
        s = s.roll(1)
    A = ((U * s) @ V[:, :4].mH).requires_grad_()
    b, k = _randn(g, 9, dtype=COMPLEX), _randn(g, 6, dtype=COMPLEX)
    d = torch.zeros(6, dtype=REAL)
    d[0] = damp
    x = fl.lstsq(A, b, damp=d, solver="svd", rcond=1e-3 / cond)
    (A_bar,) = torch.autograd.grad((x.conj() * k).real.sum(), A)
    V = V[:, :4]
    M = s**2 + (V.mH @ (d[:, None] ** 2 * V)).diagonal().real
    coefficients = s * (U.mH @ b) / M
    x = V @ coefficients
    z = V @ ((V.mH @ k) / M)
    r, null = b - A.detach() @ x, k - V @ (V.mH @ k)
    w = U @ (s * (coefficients / M))
    want = torch.outer(r, z.conj()) - torch.outer(A.detach() @ z, x.conj())
    want = want + torch.outer(w, null.conj())
    size = torch.linalg.vector_norm(w) * torch.linalg.vector_norm(k)
    # the rows of A_bar in the null space hold that term alone
    error = (A_bar - want) @ (torch.eye(6) - V @ V.mH)
    assert torch.linalg.matrix_norm(error) < 50 * torch.finfo(REAL).eps * cond * size
    if damp:  # the first unknown is held by its damping, and so not in the null space
        assert torch.linalg.vector_norm((A_bar - want)[:, 0]) < 1e-5 * size
    if cond <= 1e6:
        assert torch.linalg.matrix_norm(A_bar - want) < 1e-2 * torch.linalg.matrix_norm(want)


def test_one_damping_of_a_wide_matrix():
    """Where damping is small the sum over z^H x cancels; where it is zero it bends x."""
    g = torch.Generator().manual_seed(2)
    A, b, k = (_randn(g, *shape) for shape in ((3, 5), (3,), (5,)))
    K = torch.linalg.inv(A @ A.T)
    one = torch.ones((), dtype=REAL)

    def x(damp):
        return fl.lstsq(A, b, damp=damp, solver="qr")

    small = torch.tensor(1e-6, dtype=REAL)
    slope = -2 * small * (A.T @ (K @ (K @ b)))  # but for a part of damp^2
    assert torch.allclose(jvp(x, (small,), (one,))[1], slope, rtol=1e-9)
    assert torch.allclose(vjp(x, small)[1](k)[0], k @ slope, rtol=1e-9)
    zero, bend = torch.zeros((), dtype=REAL), -2 * (A.T @ (K @ (K @ b)))
    assert torch.allclose(jvp(lambda d: jvp(x, (d,), (one,))[1], (zero,), (one,))[1], bend)
    assert torch.allclose(jvp(lambda d: vjp(x, d)[1](k)[0], (zero,), (one,))[1], k @ bend)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_product_has_the_gradient_that_is_asked_for(asked):
    pattern = fl.SparsityPattern([0, 1, 2, 2], [1, 0, 0, 1], (3, 2))
    structure = SparseStructure(pattern)
    for make, shapes in (
        (lambda a, v: matrix.matmul(structure, (a,), v), ((4,), (2, 2))),
        (lambda a, u: matrix.rmatmul(structure, (a,), u), ((4,), (3, 2))),
        (lambda u, v: matrix.outer(structure, (torch.ones(4),), u, v)[0], ((3, 2), (2, 2))),
    ):
        g = torch.Generator().manual_seed(0)
        args = [_randn(g, *shape, dtype=COMPLEX) for shape in shapes]
        step = _randn(g, *shapes[asked], dtype=COMPLEX)
        moved = [a + step if i == asked else a for i, a in enumerate(args)]
        difference = make(*moved) - make(*args)  # exact: the maps are linear in each operand
        args[asked].requires_grad_()
        out = make(*args)
        k = _randn(g, *out.shape, dtype=COMPLEX)
        (bar,) = torch.autograd.grad(out, args[asked], k)
        _close(_inner([bar], [step]), _inner([k], [difference]))


def test_the_judge_accepts_the_rules():
    judge()


# How many mutants of an area are run here; ``python -m tests.mutants`` runs every one of all
# areas. The tests of the others take up to a minute before the first mutant.
SAMPLES = {"derivatives": 12}


@pytest.mark.slow
@pytest.mark.parametrize("area", SAMPLES)
def test_mutants_are_killed(area):
    command = [sys.executable, "-m", "tests.mutants", area, "--sample", str(SAMPLES[area])]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
