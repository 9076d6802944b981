"""What fuzzing found at the ends of the range, reduced."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

import funclsq as fl
from funclsq.backends import superlu
from funclsq.methods._protocol import Options
from funclsq.methods.cholesky import prepare
from funclsq.methods.svd import thin_svd
from funclsq.operators import SparseOp

F64 = torch.float64


def test_a_row_of_weight_zero_may_be_too_large_to_scale():
    """Scaled to the small rows that count, the large ones overflow, and 0 inf is NaN."""
    A = torch.tensor([[1e34, -1e34], [1e-36, 2e-36], [3e-36, -1e-36]])
    b = torch.tensor([[1e-37], [2e-36], [1e-36]])
    w = torch.tensor([[0.0], [1.0], [0.5]])
    x = fl.lstsq(A, b, weights=w, solver="qr")
    want = np.linalg.solve(A[1:].double().numpy() * 1e36, b[1:].double().numpy() * 1e36)
    np.testing.assert_allclose(x.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky"])
def test_entries_at_both_ends_of_the_range(solver):
    """LAPACK's QR makes NaN of subnormal numbers, to which the small entries are scaled here."""
    A = torch.tensor(
        [[1.605468710e36 - 6.914062687e35j, -1.007812495e-19 + 8.046875037e-20j,
          1.585937500 - 5.546875000e-1j],
         [2.343750034e34 - 2.332031208e36j, 4.374999942e-20 + 1.664062503e-19j,
          1.796875000e-1 - 2.234375000j]], dtype=torch.complex64,
    )  # fmt: skip
    b = torch.tensor([-1 - 1.5j, -0.75 + 0.6875j], dtype=torch.complex64)
    sol = fl.solve(A, b, solver=solver)
    assert bool(sol.converged)
    column = A[:, 0].numpy().astype(complex)  # the others are too small to count
    want = np.vdot(column, b.numpy()) / np.vdot(column, column)
    assert abs(complex(sol.x[0]) - want) < 1e-5 * abs(want)
    assert bool((sol.x[1:] == 0).all())


@pytest.mark.parametrize("seed", range(8))
def test_large_numbers_beside_a_row_without_weight(seed):
    """Null vectors were spoilt by the column of zeros, which keeps a scale of its own."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([1e-273, 2e36, 1e-234, 2, 2e24], dtype=F64)
    A = torch.randn((4, 5), dtype=F64, generator=g) * sizes
    b = torch.randn(4, dtype=F64, generator=g)
    w = torch.tensor([0.1875, 0.9375, 0.0, 0.3125], dtype=F64)
    got, want = (fl.solve(A, b, weights=w, solver=solver) for solver in ("cholesky", "svd"))
    assert int(got.rank) == int(want.rank) == 2
    error, size = (torch.linalg.vector_norm(t * 1e36) for t in (got.x - want.x, want.x))
    assert error < 1e-2 * size  # cond 1e12


@pytest.mark.parametrize("size", [1.0, 1e100])
def test_a_numerically_singular_normal_matrix_is_not_taken_for_a_regular_one(size):
    """One complex row and damping that is nothing beside it; LU does not mind such a matrix."""
    entries = [-0.875 - 0.25j, -0.6875 + 1j, -1.125 - 0.3125j, -1.0625 - 1.25j, 1.125 - 0.625j]
    values = torch.tensor(entries, dtype=torch.complex128) * size
    S = fl.SparsityPattern([0] * 5, [0, 4, 7, 12, 14], (1, 17))
    damp = torch.tensor(1e-300 * size, dtype=F64)
    b = torch.tensor([size], dtype=torch.complex128)
    sol = fl.solve(fl.Sparse(S, values), b, damp=damp, solver="cholesky")
    unit = values / size
    want = unit.conj() / torch.linalg.vector_norm(unit) ** 2
    torch.testing.assert_close(sol.x[[0, 4, 7, 12, 14]], want)
    assert float(sol.residual_norm) < 1e-14 * size


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


@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_complex_sparse_normal_matrices_are_factored_and_not_their_conjugates(seed, damp):
    """With the factor of conj(N), refinement fails or takes ten steps in place of one."""
    rng = np.random.default_rng(seed)
    A = scipy.sparse.random_array((400, 200), density=0.01, rng=rng, format="coo")
    A.data = rng.standard_normal(A.nnz) + 1j * rng.standard_normal(A.nnz)
    b = torch.from_numpy(rng.standard_normal(400) + 1j * rng.standard_normal(400))
    sol = fl.solve(A, b, damp=damp, solver="cholesky")
    assert sol.status.item() == fl.Status.DIRECT
    assert sol.iterations.item() <= 2
    x = sol.x.numpy()
    s = A.conj().T @ (b.numpy() - A @ x) - damp**2 * x
    assert np.linalg.norm(s) < 1e-12


def test_complex_sparse_batches_are_factored_and_not_their_conjugates():
    rng = np.random.default_rng(0)
    A = scipy.sparse.random_array((400, 200), density=0.01, rng=rng, format="coo")
    values = rng.standard_normal((2, A.nnz)) + 1j * rng.standard_normal((2, A.nnz))
    b = torch.from_numpy(rng.standard_normal((2, 400, 1)) + 0j)
    S = fl.SparsityPattern(A.row, A.col, A.shape)
    sol = fl.solve(fl.Sparse(S, torch.from_numpy(values)), b, damp=0.1, solver="cholesky")
    assert int(sol.iterations.max()) <= 2
    assert float(sol.normal_residual_norm.max()) < 1e-12


@pytest.mark.parametrize("size", [1.0, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7])
@pytest.mark.parametrize("damp", [1e-12, 1e-13, 1e-14, 1e-15, 1e-16])
@pytest.mark.parametrize("dtype", [F64, torch.complex128])
def test_damping_near_the_rank_tolerance(dtype, damp, size):
    """Sixteen singular values equal to damp: right, or said to be inaccurate."""
    entries = [-0.875 - 0.25j, -0.6875 + 1j, -1.125 - 0.3125j, -1.0625 - 1.25j, 1.125 - 0.625j]
    values = torch.tensor(entries, dtype=torch.complex128) * size
    values = values if dtype.is_complex else values.real.contiguous()
    S = fl.SparsityPattern([0] * 5, [0, 4, 7, 12, 14], (1, 17))
    b = torch.tensor([size], dtype=dtype)
    sol = fl.solve(fl.Sparse(S, values), b, damp=damp, solver="cholesky", on_failure="ignore")
    assert sol.status.item() in (fl.Status.DIRECT, fl.Status.INACCURATE)
    bound = 1e-14 if sol.status.item() == fl.Status.DIRECT else 1e-6
    a, x = values.numpy(), sol.x.numpy()
    r = b.numpy() - a @ x[[0, 4, 7, 12, 14]]
    s = -(damp**2) * x
    s[[0, 4, 7, 12, 14]] += a.conj() * r
    assert np.linalg.norm(s) <= bound * np.linalg.norm(a) * abs(b.numpy()[0])


@pytest.mark.parametrize("damp", [1e-12, 1e-13, 1e-14, 1e-15, 1e-16])
def test_what_a_wrong_factor_gives_is_called_inaccurate(damp, monkeypatch):
    """The factor of conj(N) here: corrections fall as if all were well, as x grows to 1e12."""
    solve = superlu._Factor.solve
    monkeypatch.setattr(superlu._Factor, "solve", lambda f, rhs: solve(f, rhs.conj()).conj())
    values = torch.tensor([-0.875 - 0.25j, -0.6875 + 1j, 1.125 - 0.625j], dtype=torch.complex128)
    S = fl.SparsityPattern([0, 0, 0], [0, 4, 14], (1, 17))
    b = torch.ones(1, dtype=torch.complex128)
    with pytest.warns(fl.ConvergenceWarning, match="INACCURATE"):
        fl.lstsq(fl.Sparse(S, values), b, damp=damp, solver="cholesky")


def test_a_row_far_below_the_others_does_not_spoil_the_null_space():
    """LAPACK's QR made NaN of the images of null vectors, subnormal beside the rounding."""
    A = torch.tensor(
        [[-0.21484375 - 0.24609375j, -0.125 - 0.0859375j, -0.0078125 - 0.46875j],
         [0.0, 0.0, 0.0],
         [-1.6796875e299 - 9.375e299j, -1.8359375e299 - 4.0234375e299j,
          6.8359375e299 - 1.18359375e300j]], dtype=torch.complex128,
    )  # fmt: skip
    b = torch.tensor([-0.625 - 0.375j, -0.125 + 1.0625j, -0.9375 + 1.0625j], dtype=A.dtype)
    sol = fl.solve(A, b, solver="cholesky")
    assert int(sol.rank) == 1
    row = (A[2] / 1e300).numpy()
    want = row.conj() / np.vdot(row, row).real * b[2].numpy()
    np.testing.assert_allclose(sol.x.numpy() * 1e300, want, rtol=1e-13)


@pytest.mark.parametrize("solver", ["lsmr", "lsqr"])
@pytest.mark.parametrize("size", [1.0, 1e274])
def test_a_tolerance_that_was_loosened_again_and_again_is_not_called_rounding(solver, size):
    """Cond 1e10: met at 3e4 times the tolerance only, without the smaller singular value."""
    A = torch.tensor([[-1.25 + 1.375j, 0.75 + 0.4375j], [0.0, 9.375e-11 - 1.1875e-10j]])
    A = A.to(torch.complex128) * size
    b = torch.tensor([-1.375 - 0.125j, -0.1875 + 0.5j], dtype=torch.complex128)
    sol = fl.solve(A, b, solver=solver, on_failure="ignore")
    A, x = A / size, sol.x * size
    s, large = (torch.linalg.vector_norm(t) for t in (A.mH @ (b - A @ x), x))
    assert bool(sol.converged) == bool(s < 1e-13 * (1 + large))


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
def test_a_direction_left_out_is_not_called_rounding_in_single_precision(solver):
    """Cond 1e4: the x of the larger singular value leaves 244 units of rounding in A^T r."""
    A = torch.tensor([[109.375, 164.0625], [2.34375e6, -1.15625e6]])
    b = torch.tensor([1.375, 1.5])
    sol = fl.solve(A, b, solver=solver, on_failure="ignore")
    A, b, x = A.double(), b.double(), sol.x.double()
    a, s = torch.linalg.matrix_norm(A), torch.linalg.vector_norm(A.T @ (b - A @ x))
    units = s / (a * (a * x.norm() + b.norm()) * torch.finfo(torch.float32).eps)
    assert units < 200 or not bool(sol.converged)


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize(
    ("entry", "b"),
    [(-1.25e-36, 7.8e-27), (1.43e-22 + 2.2e-22j, -4.97e-25 - 2.76e-25j), (3e-30, 1e-20)],
)
def test_a_tiny_operator_in_single_precision_neither_raises_nor_warns_of_numpy(entry, b, solver):
    """Its entries are not at hand to be scaled: 1 / |A|^2 is not a number of single precision."""
    dtype = torch.complex64 if isinstance(entry, complex) else torch.float32
    A = fl.LinearOperator(lambda p, v: p[0] @ v, (1, 1), (torch.tensor([[entry]], dtype=dtype),))
    sol = fl.solve(A, torch.tensor([b], dtype=dtype), solver=solver, on_failure="ignore")
    if bool(sol.converged):
        assert bool(torch.isfinite(sol.x).all())
    else:
        assert sol.message


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("smaller", [1e-2, 1e-4, 1e-6])
def test_a_long_null_part_taken_off_leaves_no_residual(kind, smaller):
    """Parallel columns of very different size: scaled, the minimiser has a long null part."""
    rng = np.random.default_rng(4)
    A = rng.standard_normal((9, 3)) + (1j * rng.standard_normal((9, 3)) if kind.is_complex else 0)
    A[:, 2] = smaller * A[:, 0]
    b = rng.standard_normal(9) + 0j
    A, b = torch.from_numpy(A).to(kind), torch.from_numpy(b if kind.is_complex else b.real)
    sol = fl.solve(fl.Sparse.from_torch(A.to_sparse()), b, solver="cholesky")
    assert int(sol.rank) == 2
    wide, x, c = (t.numpy().astype(np.clongdouble) for t in (A, sol.x, b))
    left = np.linalg.norm((wide.conj().T @ (c - wide @ x)).astype(complex))
    assert left <= 5e-16 * torch.linalg.matrix_norm(A) * torch.linalg.vector_norm(b)


@pytest.mark.parametrize("smaller", [2.0**-7, 2.0**-13, 2.0**-20])
def test_dependent_columns_of_different_size_keep_the_least_norm(smaller):
    """Null vectors of short columns are long, and must not drown the others."""
    rng = np.random.default_rng(4)
    A = rng.standard_normal((40, 12))
    A[:, 2], A[:, 7], A[:, 9] = smaller * A[:, 0], A[:, 5], -4 * A[:, 5]
    null = np.zeros((12, 3))
    null[[0, 2], 0] = -smaller, 1
    null[[5, 7], 1] = 1, -1
    null[[5, 9], 2] = 4, 1
    null /= np.linalg.norm(null, axis=0)
    b, g = rng.standard_normal(40), rng.standard_normal(12)
    S = fl.Sparse.from_torch(torch.from_numpy(A).to_sparse())
    operator = SparseOp(S.pattern, S.values)
    prepared = prepare(operator, None, Options())
    true = np.linalg.pinv(A, rcond=1e-12)
    far = 2.0**-52 / smaller  # g is asked of the short column, whose part in x is that much longer
    cases = (b, None, true @ b, 1e-14), (None, g, true @ (true.T @ g), far)
    for c, h, want, close in cases:
        c, h = (None if v is None else torch.from_numpy(v[:, None]) for v in (c, h))
        x, status, _ = prepared.solve(c, h)[:3]
        assert status.tolist() == [int(fl.Status.DIRECT)]
        x = x[:, 0].numpy()
        assert np.abs(null.T @ x).max() <= 1e-15 * np.linalg.norm(x)
        assert np.linalg.norm(x - want) <= close * np.linalg.norm(want)


@pytest.mark.parametrize("size", [1e-140, 1e-165, 1e-250])
@pytest.mark.parametrize("solver", ["auto", "qr", "cholesky", "lsmr"])
def test_a_verdict_that_does_not_depend_on_the_scaling_of_columns(solver, size):
    rng = np.random.default_rng(0)
    A, b = rng.standard_normal((6, 3)), torch.from_numpy(rng.standard_normal(6))
    scaled = torch.from_numpy(A * [1, size, 1])
    sol = fl.solve(scaled, b, solver=solver, scale=True)
    want = np.linalg.lstsq(A, b.numpy(), rcond=None)[0]
    assert int(sol.rank) == 3
    np.testing.assert_allclose(sol.x.numpy() * [1, size, 1], want, rtol=1e-12)
