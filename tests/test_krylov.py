"""LSMR, LSQR and CGLS: optimality, every rank, columns and batches, statuses, products counted."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse
import torch
from devices import DEVICE

from funclsq.methods import cgls, lsmr, lsqr
from funclsq.methods._protocol import Options
from funclsq.methods._scalars import TensorScalars
from funclsq.operators import DenseOp, SparseOp
from funclsq.pattern import SparsityPattern
from funclsq.solution import Status

METHODS = pytest.mark.parametrize("method", [lsmr, lsqr, cgls], ids=["lsmr", "lsqr", "cgls"])
SHAPES = {
    "tall": (40, 15, 15),
    "square": (20, 20, 20),
    "wide": (15, 40, 15),
    "tall-deficient": (40, 15, 9),
    "wide-deficient": (15, 40, 9),
}


class Counting:
    """An operator that counts its products, column by column."""

    def __init__(self, op, counts=None):
        self.op, self.counts = op, counts if counts is not None else [0, 0]
        self.shape, self.dtype, self.device, self.batch = op.shape, op.dtype, op.device, op.batch

    def mv(self, X, out=None):
        self.counts[0] += 1
        return self.op.mv(X, out=out)

    def rmv(self, Y, out=None):
        self.counts[1] += 1
        return self.op.rmv(Y, out=out)

    def scaled(self, row=None, col=None):
        return Counting(self.op.scaled(row=row, col=col), self.counts)

    def column_norms(self):
        return self.op.column_norms()


class Unscaled(Counting):
    """One whose columns cannot be scaled, as they are not known."""

    def column_norms(self):
        return None


def make(kind, dtype, k, seed=0):
    m, n, rank = SHAPES[kind]
    rng = np.random.default_rng(seed)

    def draw(*shape):
        real = rng.standard_normal(shape)
        return real + 1j * rng.standard_normal(shape) if np.issubdtype(dtype, complex) else real

    A = np.linalg.qr(draw(m, rank))[0] * np.linspace(1, 30, rank) @ np.linalg.qr(draw(n, rank))[0].T
    return tuple(t.astype(dtype) for t in (A, draw(m, k), draw(n, k)))


def graded(m, n, cond, seed=0):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (m, n))
    return U * np.logspace(0, -np.log10(cond), n) @ V.T


def prepare(method, A, damp=None, full_rank=False, **options):
    op = DenseOp(torch.as_tensor(A)) if isinstance(A, np.ndarray | torch.Tensor) else A
    damp = None if damp is None else torch.as_tensor(damp)
    return method.prepare(op, damp, Options(**options), full_rank)


def columns(*arrays):
    return [torch.as_tensor(a) for a in arrays]


def error(x, reference):
    top = np.abs(reference).max()  # so that no square underflows
    return np.linalg.norm((x.numpy() - reference) / top) / np.linalg.norm(reference / top)


@METHODS
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128], ids=lambda t: t.__name__)
@pytest.mark.parametrize("kind", SHAPES)
def test_agrees_with_svd(method, kind, dtype, k):
    A, b, g = make(kind, dtype, k)
    wide = A.astype(np.complex128)
    inverse = np.linalg.pinv(wide, rcond=1e-4)
    x = inverse @ b
    z = inverse @ (inverse.conj().T @ g)
    tolerance = 3e3 * np.finfo(dtype).eps
    p = prepare(method, A)
    b, g = columns(b, g)
    both = p.solve(b, g)
    for raw, reference in (
        (p.solve(b, None), x),
        (p.solve(None, g), z),
        (both, x + z),
        (p.adjoint(g), wide @ z),
    ):
        assert error(raw.x, reference) < tolerance
        assert all(Status(int(s)).converged for s in raw.status)
        assert raw.status.shape == raw.iterations.shape == (k,)
    _, n, rank = SHAPES[kind]
    assert p.deficient == (rank < n)
    assert (p.rank is None) if rank < n else int(p.rank) == n
    assert 3 < float(p.cond) < 60


@METHODS
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("k", [1, 2])
def test_optimality_with_damping(method, kind, k):
    A, b, g = make(kind, np.float64, k)
    damp = np.linspace(0.1, 1.0, A.shape[1])
    p = prepare(method, A, damp)
    assert not p.deficient
    b, g = columns(b, g)
    raw = p.solve(b, g)
    normal = A.T @ (b.numpy() - A @ raw.x.numpy()) + g.numpy() - damp[:, None] ** 2 * raw.x.numpy()
    assert np.abs(normal).max() < 1e-11
    y = p.adjoint(g).x.numpy()
    G = A.T @ A + np.diag(damp**2)
    np.testing.assert_allclose(y, A @ np.linalg.solve(G, g.numpy()), atol=1e-11)


@METHODS
def test_partial_damping_is_not_taken_for_full_rank(method):
    A, b, _ = make("wide", np.float64, 1)
    damp = np.zeros(40)
    damp[:5] = 0.5
    p = prepare(method, A, damp)
    assert p.deficient
    stacked = np.vstack([A, np.diag(damp)])
    x = np.linalg.pinv(stacked) @ np.vstack([b, np.zeros((40, 1))])
    assert error(p.solve(torch.as_tensor(b), None).x, x) < 1e-12


@METHODS
def test_graded_columns_need_no_more_steps_than_equal_ones(method):
    A, b, g = make("tall", np.float64, 1)
    scale = np.logspace(-4, 4, 15)
    plain, hard = prepare(method, A), prepare(method, A * scale)
    b, g = columns(b, g)
    expected = plain.solve(b, None)
    raw = hard.solve(b, None)
    assert error(raw.x * torch.as_tensor(scale)[:, None], expected.x.numpy()) < 1e-12
    assert int(raw.iterations) <= int(expected.iterations) + 5
    assert not hard.deficient
    z = hard.solve(None, g * torch.as_tensor(scale)[:, None])
    assert error(z.x * torch.as_tensor(scale)[:, None], plain.solve(None, g).x.numpy()) < 1e-12


@METHODS
def test_scaling_does_not_change_which_minimiser_is_found(method):
    A, b, _ = make("tall-deficient", np.float64, 2)
    A = A * np.logspace(-1, 1, 15)
    x = np.linalg.pinv(A, rcond=1e-10) @ b
    assert error(prepare(method, A).solve(torch.as_tensor(b), None).x, x) < 1e-11


@METHODS
@pytest.mark.parametrize("cond", [1e2, 1e5, 1e7])
def test_as_accurate_as_qr(method, cond):
    mpmath = pytest.importorskip("mpmath")
    n = 12
    A = graded(30, n, cond)
    rng = np.random.default_rng(3)
    b, g = rng.standard_normal((30, 1)), rng.standard_normal((n, 1))
    with mpmath.workdps(50):
        exact = mpmath.matrix(A.tolist())
        G = exact.T * exact
        x, z = (mpmath.lu_solve(G, t) for t in (exact.T * mpmath.matrix(b), mpmath.matrix(g)))
        references = [np.array(t.tolist(), dtype=float) for t in (x, z, exact * z)]
    p = prepare(method, A, full_rank=True, maxiter=50_000)
    Q, R = np.linalg.qr(A)
    via_qr = [np.linalg.solve(R, Q.T @ b), np.linalg.solve(R, np.linalg.solve(R.T, g))]
    via_qr.append(A @ via_qr[1])
    b, g = columns(b, g)
    z = p.solve(None, g).x
    for ours, theirs, reference in zip(
        (p.solve(b, None).x, z, torch.as_tensor(A) @ z), via_qr, references
    ):
        limit = 50 * np.linalg.norm(theirs - reference) + 100 * 2.3e-16 * np.linalg.norm(reference)
        assert np.linalg.norm(ours.numpy() - reference) < limit


@METHODS
def test_columns_solved_together_equal_columns_solved_alone(method):
    A, b, g = make("tall", np.float64, 5)
    b[:, 2] = A @ np.ones(15)  # stops by the other test, earlier
    b[:, 3] *= 1e-200
    p = prepare(method, A)
    b, g = columns(b, g)
    together = p.solve(b, None)
    for j in range(5):
        alone = p.solve(b[:, j : j + 1], None)
        assert error(together.x[:, j : j + 1], alone.x.numpy()) < 1e-12
    assert error(p.solve(None, g).x[:, 1:2], p.solve(None, g[:, 1:2]).x.numpy()) < 1e-12


@METHODS
@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("damp", [1e-1, 1e-4, 1e-7])
def test_little_damping_of_a_wide_matrix_takes_about_as_many_steps_as_rows(method, damp, spread):
    """Unit columns would give the null space small eigenvalues of many sizes."""
    rng = np.random.default_rng(3)
    A, b = torch.as_tensor(rng.standard_normal((30, 90))), torch.as_tensor(rng.standard_normal(30))
    d = damp * torch.as_tensor(spread ** rng.random(90))
    raw = prepare(method, A, d).solve(b[:, None], None)
    B = A / d
    unit = torch.eye(30, dtype=torch.float64)
    exact = (B.T @ torch.linalg.solve(B @ B.T + unit, b)) / d
    assert (raw.x[:, 0] - exact).norm() < 1e-12 * exact.norm()
    assert int(raw.iterations) <= 75  # 30 but for rounding; unit columns take up to 1000


@METHODS
def test_frozen_columns_are_not_touched(method):
    """A column that stopped keeps its bits however long the others go on."""
    hard = torch.as_tensor(graded(60, 30, 1e4, seed=1))
    easy = hard @ torch.linalg.svd(hard).Vh[:2].T  # two steps at most
    slow = torch.randn(60, 2, dtype=torch.float64)
    b = torch.cat([easy[:, :1], slow, easy[:, 1:]], 1)
    p = prepare(method, hard, full_rank=True, scale=False)
    few = dataclasses.replace(p._options, maxiter=20)
    short, long = p.with_options(few).solve(b, None), p.solve(b, None)
    stopped = [0, 3]
    assert (short.iterations[stopped] < 20).all()
    assert (long.iterations[1:3] > 40).all()
    assert torch.equal(short.x[:, stopped], long.x[:, stopped])
    assert torch.equal(short.iterations[stopped], long.iterations[stopped])


def sparse(values, pattern):
    return SparseOp(pattern, values)


@METHODS
def test_batch_equals_loop(method):
    rng = np.random.default_rng(5)
    row, col = np.arange(90) % 30, rng.integers(0, 10, 90)
    pattern = SparsityPattern(*np.unique(np.stack([row, col]), axis=1), (30, 10))
    values = torch.as_tensor(rng.standard_normal((4, pattern.nnz)))
    values[3] = values[3] * torch.logspace(-3, 3, pattern.nnz, dtype=torch.float64)
    b, g = torch.randn(4, 30, 2).double(), torch.randn(4, 10, 2).double()
    damp = torch.rand(4, 10).double() + 0.1
    for d in (None, damp):
        whole = prepare(method, sparse(values, pattern), d)
        raws = [whole.solve(b, None), whole.solve(None, g), whole.solve(b[0], g)]
        assert whole.rank.shape == whole.cond.shape == (4,)
        for i in range(4):
            one = prepare(method, sparse(values[i], pattern), None if d is None else d[i])
            singles = [one.solve(b[i], None), one.solve(None, g[i]), one.solve(b[0], g[i])]
            for raw, single in zip(raws, singles):
                assert error(raw.x[i], single.x.numpy()) < 1e-9
                assert raw.status[i].tolist() == single.status.tolist()


@METHODS
def test_members_of_a_batch_stop_on_their_own(method):
    A = torch.stack([torch.eye(30, 12).double(), torch.as_tensor(graded(30, 12, 1e4))])
    b = torch.randn(2, 30, 1).double()
    raw = prepare(method, A, full_rank=True).solve(b, None)
    assert raw.iterations[0] <= 2
    assert raw.iterations[1] > 12
    assert torch.allclose(raw.x[0], b[0, :12], atol=1e-15)


@METHODS
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (1, 4), (4, 1), (5, 3)])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("fill", [0.0, 2.0])
def test_degenerate_shapes(method, shape, k, fill):
    m, n = shape
    A = torch.full(shape, fill, dtype=torch.float64)
    b, g = torch.ones(m, k).double(), torch.ones(n, k).double()
    p = prepare(method, A)
    inverse = torch.linalg.pinv(A) if m and n else torch.zeros(n, m).double()
    x, z = p.solve(b, None), p.solve(None, g)
    torch.testing.assert_close(x.x, inverse @ b)
    torch.testing.assert_close(z.x, inverse @ (inverse.T @ g))
    torch.testing.assert_close(p.solve(b, g).x, x.x + z.x)
    torch.testing.assert_close(p.adjoint(g).x, inverse.T @ g)
    assert all(Status(int(s)).converged for s in x.status)


@METHODS
def test_no_stored_entries_and_empty_batch(method):
    pattern = SparsityPattern([], [], (4, 3))
    p = prepare(method, sparse(torch.zeros(0, dtype=torch.float64), pattern))
    raw = p.solve(torch.ones(4, 2).double(), torch.ones(3, 2).double())
    assert torch.equal(raw.x, torch.zeros(3, 2).double())
    full = SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2))
    p = prepare(method, sparse(torch.zeros(0, 3).double(), full))
    assert p.solve(torch.ones(0, 3, 2).double(), None).x.shape == (0, 2, 2)


@METHODS
def test_zero_rows_columns_and_right_hand_sides(method):
    A, b, _ = make("tall", np.float64, 3)
    A[:, 4] = 0
    A[7] = 0
    b[:, 1] = 0
    p = prepare(method, A)
    b = torch.as_tensor(b)
    raw = p.solve(b, None)
    assert error(raw.x, np.linalg.pinv(A) @ b.numpy()) < 1e-12
    assert int(raw.status[1]) == Status.START_SOLVES
    assert int(raw.iterations[1]) == 0
    assert torch.equal(raw.x[:, 1], torch.zeros(15).double())
    assert p.deficient
    damped = prepare(method, A, np.full(15, 0.3)).solve(b, None).x
    assert error(damped, np.linalg.solve(A.T @ A + 0.09 * np.eye(15), A.T @ b.numpy())) < 1e-12


@METHODS
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e150, 1e300])
def test_extreme_scales(method, size):
    A, b, _ = make("tall", np.float64, 2)
    expected = np.linalg.pinv(A) @ b
    b = torch.as_tensor(b)
    for kind in ("tall", "wide"):
        A, c, _ = make(kind, np.float64, 2)
        x = np.linalg.pinv(A) @ c
        raw = prepare(method, A * (size / 100)).solve(torch.as_tensor(c * (size / 100)), None)
        assert error(raw.x, x) < 1e-11
        raw = prepare(method, A).solve(torch.as_tensor(c * (size / 100)), None)
        assert error(raw.x / (size / 100), x) < 1e-11
    A, _, _ = make("tall", np.float64, 2)
    mixed = A * np.where(np.arange(15) % 2, 1.0, size / 100)
    raw = prepare(method, mixed).solve(b, None)
    assert error(raw.x * torch.as_tensor(np.where(np.arange(15) % 2, 1.0, size / 100))[:, None],
                 expected) < 1e-11  # fmt: skip


# Statuses


@METHODS
def test_status_of_loose_tolerances(method):
    A = graded(50, 20, 1e3)
    consistent = torch.as_tensor(A @ np.ones((20, 1)))
    general = torch.randn(50, 1).double()
    loose = prepare(method, A, full_rank=True, atol=1e-6, btol=1e-6)
    tight = prepare(method, A, full_rank=True)
    assert int(loose.solve(consistent, None).status) == Status.RESIDUAL_SMALL
    assert int(loose.solve(general, None).status) == Status.NORMAL_RESIDUAL_SMALL
    assert int(tight.solve(consistent, None).status) == Status.RESIDUAL_AT_EPS
    assert int(tight.solve(general, None).status) == Status.NORMAL_RESIDUAL_AT_EPS
    assert loose.solve(general, None).iterations < tight.solve(general, None).iterations


@METHODS
@pytest.mark.parametrize("k", [1, 2])
def test_status_condition_limit_and_maxiter(method, k):
    A = graded(50, 20, 1e6)
    b = torch.randn(50, k).double()
    raw = prepare(method, A, full_rank=True, conlim=10.0).solve(b, None)
    assert set(raw.status.tolist()) == {Status.CONDITION_LIMIT}
    raw = prepare(method, A, full_rank=True, maxiter=5).solve(b, None)
    assert set(raw.status.tolist()) == {Status.MAXITER}
    assert set(raw.iterations.tolist()) == {5}
    raw = prepare(method, A, full_rank=True, maxiter=0).solve(b, None)
    assert set(raw.status.tolist()) == {Status.MAXITER}


@METHODS
def test_status_of_non_finite_columns(method):
    A, b, _ = make("tall", np.float64, 3)
    b[0, 1] = np.nan
    raw = prepare(method, A, full_rank=True).solve(torch.as_tensor(b), None)
    assert int(raw.status[1]) == Status.NONFINITE
    good = [0, 2]
    assert error(raw.x[:, good], np.linalg.pinv(A) @ b[:, good]) < 1e-12
    raw = prepare(method, A, full_rank=True).solve(torch.as_tensor(b[:, 1:2]), None)
    assert int(raw.status[0]) == Status.NONFINITE


@pytest.mark.parametrize("atol", [1e-15, 1e-14])
def test_a_false_promise_of_full_rank_does_not_pass_for_converged(data, atol):
    """Column-scaled InstEval, rank 4105 of 4126: x grows in the null space past convergence."""
    A, b = insteval(data)
    options = {"atol": atol, "btol": atol, "maxiter": 400}
    raw = prepare(lsmr, A, full_rank=True, **options).solve(b, None)
    residual = float(torch.linalg.vector_norm(b - A.mv(raw.x)))
    honest = abs(residual - 309.58495399) < 1e-6
    assert honest or not Status(int(raw.status)).converged


@METHODS
def test_rank_deficient_real_problem_reaches_its_minimum(data, method):
    A, b = insteval(data)
    p = prepare(method, A)
    raw = p.solve(b, None)
    assert p.deficient
    assert Status(int(raw.status)).converged
    assert abs(float(torch.linalg.vector_norm(b - A.mv(raw.x))) - 309.58495399) < 1e-7


def insteval(data):
    z = np.load(data / "regression" / "insteval.npz")
    A = scipy.sparse.csc_array((z["data"], z["indices"], z["indptr"]), shape=tuple(z["shape"]))
    entries = A.tocoo()
    norms = np.sqrt(np.bincount(entries.col, entries.data**2))
    pattern = SparsityPattern(entries.row, entries.col, A.shape)
    order = pattern.order if pattern.order is not None else slice(None)
    values = (entries.data / norms[entries.col])[order]
    return sparse(torch.as_tensor(values), pattern), torch.as_tensor(z["b"])[:, None]


@METHODS
def test_slow_problem_converges_or_says_so(method):
    """1-D Laplacian with damping 1e-3, 600 x 300, where others stop at the cap without a word."""
    n = 300
    A = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    damp = np.full(n, 1e-3)
    b = np.random.default_rng(0).standard_normal((n, 1))
    x = np.linalg.lstsq(np.vstack([A, np.diag(damp)]), np.vstack([b, 0 * b]), rcond=None)[0]
    capped = prepare(method, A, damp, maxiter=300).solve(torch.as_tensor(b), None)
    assert int(capped.status) == Status.MAXITER
    raw = prepare(method, A, damp).solve(torch.as_tensor(b), None)
    if method is cgls:
        assert error(raw.x, x) < 1e-9 or not Status(int(raw.status)).converged
    else:
        assert Status(int(raw.status)).converged
        assert error(raw.x, x) < 1e-10


# Cost


@METHODS
def test_one_run_for_g_where_full_rank_is_known(method):
    A, b, g = make("tall", np.float64, 1)
    b, g = columns(b, g)
    op = Counting(DenseOp(torch.as_tensor(A)))
    p = prepare(method, op, full_rank=True)
    raw = p.solve(b, None)
    forward = list(op.counts)
    # One product each way per step, one A^H u to start, one pair to verify.
    assert forward == [int(raw.iterations) + 1, int(raw.iterations) + 2]
    op.counts[:] = 0, 0
    raw = p.solve(None, g)
    assert op.counts[0] <= int(raw.iterations) + 3
    assert sum(op.counts) <= 1.5 * sum(forward)


def test_columns_share_their_products():
    A, b, _ = make("tall", np.float64, 6)
    op = Counting(DenseOp(torch.as_tensor(A)))
    raw = prepare(lsmr, op, full_rank=True).solve(torch.as_tensor(b), None)
    assert op.counts[0] <= int(raw.iterations.max()) + 3


def test_rank_is_looked_for_once_and_cheaply():
    A, b, _ = make("tall", np.float64, 1)
    op = Counting(DenseOp(torch.as_tensor(A)))
    p = prepare(lsmr, op)
    assert op.counts == [0, 0]
    assert not p.deficient
    probe = sum(op.counts)
    raw = p.solve(torch.as_tensor(b), None)
    assert probe <= sum(op.counts) - probe + 4
    again = sum(op.counts)
    p.with_options(Options(maxiter=50)).solve(torch.as_tensor(b), None)
    assert sum(op.counts) - again == 2 * int(raw.iterations) + 3


class Related:
    """A complete factor of a nearby matrix as preconditioner."""

    def __init__(self, A):
        self.R = torch.linalg.qr(A).R

    def solve_normal(self, v):
        half = torch.linalg.solve_triangular(self.R.mT, v, upper=False)
        return torch.linalg.solve_triangular(self.R, half, upper=True)


@METHODS
@pytest.mark.parametrize("k", [1, 3])
def test_preconditioner(method, k):
    A = torch.as_tensor(graded(60, 25, 1e4))
    near = A * torch.linspace(0.8, 1.2, 60).double()[:, None]
    b, g = torch.randn(60, k).double(), torch.randn(25, k).double()
    plain, fast = (
        prepare(method, A, full_rank=True, preconditioner=M) for M in (None, Related(near))
    )
    Q, R = np.linalg.qr(A.numpy())
    x = np.linalg.solve(R, Q.T @ b.numpy())
    raw = fast.solve(b, None)
    assert error(raw.x, x) < 1e-9
    assert int(raw.iterations.max()) * 2 < int(plain.solve(b, None).iterations.max())
    assert all(Status(int(s)).converged for s in raw.status)
    z = fast.solve(None, g)
    assert error(z.x, np.linalg.solve(R, np.linalg.solve(R.T, g.numpy()))) < 1e-9


# Reports


@METHODS
@pytest.mark.parametrize("k", [1, 2])
def test_callback_sees_each_step(method, k):
    A, b, _ = make("tall", np.float64, k)
    seen = []
    raw = prepare(method, A, full_rank=True, callback=seen.append).solve(torch.as_tensor(b), None)
    assert [s["iteration"] for s in seen][: int(raw.iterations.max())] == list(
        range(1, int(raw.iterations.max()) + 1)
    )
    assert seen[-1]["normal_residual_norm"].max() < 1e-6 * seen[0]["normal_residual_norm"].max()
    assert seen[0]["active"].all()


def test_interrupt_leaves_no_state():
    A, b, _ = make("tall", np.float64, 1)

    def stop(state):
        if state["iteration"] == 3:
            raise KeyboardInterrupt

    p = prepare(lsmr, A, callback=stop)
    with pytest.raises(KeyboardInterrupt):
        p.solve(torch.as_tensor(b), None)
    raw = p.with_options(Options()).solve(torch.as_tensor(b), None)
    assert error(raw.x, np.linalg.pinv(A) @ b) < 1e-12


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    A, b, _ = make("tall", np.float64, 1)
    prepare(lsmr, A, full_rank=True, progress=True).solve(torch.as_tensor(b), None)
    assert "funclsq" in capsys.readouterr().err


def test_inputs_are_not_written_to():
    A, b, g = columns(*make("tall", np.float64, 2))
    copies = [t.clone() for t in (A, b, g)]
    p = prepare(lsmr, A)
    p.solve(b, g)
    p.adjoint(g)
    assert all(torch.equal(t, c) for t, c in zip((A, b, g), copies))


@pytest.fixture
def on_device(monkeypatch):
    """The arithmetic of accelerators, run on the CPU: the host looks every eight steps."""

    def scalars(block):
        return TensorScalars(block.shape[:-2] + block.shape[-1:], block.device)

    def switch():
        monkeypatch.setattr("funclsq.methods._iterate.scalars_for", scalars)

    return switch


@METHODS
@pytest.mark.parametrize("kind", SHAPES)
def test_scalars_kept_on_a_device(method, kind, on_device):
    A, b, g = make(kind, np.float64, 4)
    b[:, 1] = A @ np.ones(A.shape[1])  # consistent: ends by another test
    b[:, 2] = 0
    expected = prepare(method, A).solve(*columns(b, g))
    on_device()
    raw = prepare(method, A).solve(*columns(b, g))
    assert error(raw.x, expected.x.numpy()) < 1e-11
    assert np.array_equal(raw.status, expected.status)


@pytest.mark.parametrize(
    (
        "method",
        "dtype",
    ),  # where no product of two norms, nor a square of one, has to be represented
    [
        (lsmr, np.float32),
        (lsmr, np.complex64),
        (lsqr, np.float32),
        (lsqr, np.complex64),
        (lsqr, np.float64),
        (lsqr, np.complex128),
    ],
)
@pytest.mark.parametrize("power", [-1, 1])
def test_norms_on_a_device_keep_to_the_range(method, power, dtype, on_device):
    """Squares of such entries vanish or overflow: nothing may be taken for zero, or solved."""
    scale = float(np.finfo(dtype).max) ** (0.6 * power)
    A, b, _ = make("tall", dtype, 2)
    b[:, 1] = 0  # a norm of zero says nothing of the range
    x = np.linalg.lstsq(A.astype(complex), b, rcond=None)[0]
    on_device()
    raw = method.prepare(Unscaled(DenseOp(torch.from_numpy(A) * scale)), None, Options(), True)
    x_scaled = raw.solve(columns(b)[0], None).x.to(torch.complex128) * scale
    assert error(x_scaled, x) < 1e3 * np.finfo(dtype).eps


@METHODS
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 13])
def test_any_number_of_steps_on_a_device(method, steps, on_device):
    A, b, _ = make("tall", np.float64, 3)
    expected = prepare(method, A, maxiter=steps).solve(columns(b)[0], None)
    on_device()
    raw = prepare(method, A, maxiter=steps).solve(columns(b)[0], None)
    assert np.array_equal(raw.iterations, expected.iterations)
    assert error(raw.x, expected.x.numpy()) < 1e-11


@pytest.mark.cuda
@METHODS
def test_cuda(method):
    for kind in SHAPES:
        A, b, g = columns(*make(kind, np.float64, 3))
        host = method.prepare(DenseOp(A), None, Options(), False).solve(b, g)
        device = method.prepare(DenseOp(A.to(DEVICE)), None, Options(), False)
        raw = device.solve(b.to(DEVICE), g.to(DEVICE))
        assert raw.x.device.type == DEVICE
        assert error(raw.x.cpu(), host.x.numpy()) < 1e-11
