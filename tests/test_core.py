"""The preconditioner of the Cholesky solver: what it inverts, and what it calls inaccurate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funclsq.methods import _core, _nullspace
from funclsq.methods._core import Core
from funclsq.methods._normal import Normal
from funclsq.operators import DenseOp, StackedOp
from funclsq.solution import Status

EPS = np.finfo(float).eps
DIRECT, INACCURATE = int(Status.DIRECT), int(Status.INACCURATE)
FAIR = (0.9, 0.8, 0.7, 0.6, 0.5)


def planted(sigma, m=12, kind=complex):
    """A with these singular values and columns of one length, and its right singular vectors."""
    n = len(sigma)
    rng = np.random.default_rng(0)
    U = rng.standard_normal((m, n)) + 1j * rng.standard_normal((m, n))
    V = np.exp(2j * np.pi * (np.outer(np.arange(n), np.arange(n)) / n + rng.random((n, 1))))
    U, V = np.linalg.qr(U)[0], V / n**0.5
    return (U * sigma) @ V.conj().T, V


def core_of(A, rcond=1e-12, zeros=False):
    """With ``zeros``, a column of zeros is put first."""
    A = np.concatenate((np.zeros((len(A), 1)), A), 1) if zeros else A
    core = Core(DenseOp(torch.from_numpy(A)), rcond, None)
    assert (core.normal.scale[int(zeros) :] == 1).all()
    return core


def with_exact_solves(core, V, sigma):
    """The same with (N + shift I)^-1 free of rounding, which its small eigenvalues enlarge."""
    W = torch.from_numpy(V)
    inverse = torch.from_numpy(1 / (np.asarray(sigma) ** 2 + core.normal.shift))
    core.normal.solve = lambda q: W @ (inverse.unsqueeze(-1) * (W.mH @ q))
    return core


def test_what_the_shift_spoils_is_made_good():
    sigma = np.array([*FAIR, 1.5e-7, 0.0, 0.0])
    A, V = planted(sigma)
    core = with_exact_solves(core_of(A), V, sigma)
    assert core.normal.shift > 0.4 * sigma[5] ** 2
    V, sigma = V[:, :6], sigma[:6]
    P = core._rough(torch.from_numpy(V * sigma)).numpy()
    np.testing.assert_allclose((V * sigma).conj().T @ P, np.eye(6), atol=1e-6)


def test_null_vectors_neither_enter_nor_leave_the_preconditioner():
    """Divided by the shift, 1e-14, what rounding leaves of them would be as long as the rest."""
    sigma = np.array([*FAIR, 0.0, 0.0])
    A, V = planted(sigma)
    core = core_of(A)
    rng = np.random.default_rng(1)
    q = torch.from_numpy(V @ rng.standard_normal((7, 3)))
    for apply in (core._rough, core._fine):
        z = apply(q)
        left = torch.linalg.vector_norm(core._nulls.mH @ z)
        assert left <= 1e-14 * torch.linalg.vector_norm(z)
        want = (V[:, :5] / sigma[:5] ** 2) @ (V[:, :5].conj().T @ q.numpy())
        np.testing.assert_allclose(z.numpy(), want, atol=1e-11)
    with_exact_solves(core, V, sigma)
    z = core._rough(torch.from_numpy(V[:, 5:]))
    assert torch.linalg.vector_norm(z) <= 1e-12


SIZES = [(1.0, None, 1e-9), (None, 1.0, 1e-9), (1.0, None, 10.0), (None, 1.0, 10.0),
         (1.0, None, 1e9), (None, 1.0, 1e9), (1.0, 0.1, 1e9), (1.0, 1.0, 1e-9)]  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("deficient", [False, True])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("c", "g", "v"), SIZES)
@pytest.mark.parametrize("rcond", [1e-12, 1e-20])
def test_which_residuals_are_called_inaccurate(c, g, v, power, deficient, zeros, rcond):
    """Twenty times the tolerance, of the sizes of the terms; null vectors do not count."""
    sigma = np.array([*FAIR, *[0.0] * (2 * deficient)])
    A, V = planted(sigma)
    core = core_of(A, 1e-12 if deficient else rcond, zeros)
    rcond = max(1e-12 if deficient else rcond, EPS)
    assert (core.small is not None) == deficient
    top = float(core.top)
    bottom = top / (10 * float(core.cond))
    sizes = c or 0.0, g or 0.0
    most = sizes[0] / bottom + sizes[1] / bottom**power
    bound = 20 * rcond * (top * sizes[0] + sizes[1] + top**power * min(v, most))
    row = V[:, 0] * 0.6 + V[:, 1] * 0.8
    null = 1e3 * V[:, -1] if deficient else 0 * row
    if zeros:
        row, null = np.append(0, row), np.append(1e3, null)
    s = torch.from_numpy(bound * np.stack((0.997 * row + null, 1.003 * row + null), 1))

    def columns(rows, size):
        out = torch.zeros((rows, 2), dtype=s.dtype)
        out[1] = 0 if size is None else size * 1j
        return None if size is None else out

    blocks = columns(12, c), columns(len(s), g), columns(len(s), v)
    for status in (DIRECT, int(Status.NONFINITE)):
        given = torch.full((2,), status)
        got = core._judged(given, s, *blocks, power).tolist()
        assert got == [status, INACCURATE if status == DIRECT else status]


def pairs(*sines, length=0.7):
    """Pairs of columns of one length at these angles: singular values length (1 -+ cos)^1/2."""
    A = np.zeros((3 * len(sines), 2 * len(sines)))
    for i, s in enumerate(sines):
        A[3 * i, 2 * i] = length
        A[3 * i : 3 * i + 2, 2 * i + 1] = length * np.array([(1 - s**2) ** 0.5, s])
    return A


def values(sine, length=0.7):
    """Singular values of a pair."""
    cosine = (1 - sine**2) ** 0.5
    return length * (1 + cosine) ** 0.5, length * sine / (1 + cosine) ** 0.5


def sine_for(ratio):
    """The angle of a pair whose singular values have this ratio, smaller to larger."""
    return 2 * ratio / (1 + ratio**2)


@pytest.mark.parametrize(("below", "plain"), [(0.995, True), (1.005, False)])
@pytest.mark.parametrize("rcond", [1e-12, 1e-4])
def test_up_to_which_condition_the_plain_factor_is_used(rcond, below, plain):
    """1e6, or where full rank is sure."""
    cond = below * min(1e6, 0.1 / rcond)
    core = core_of(pairs(sine_for(1 / cond)), rcond)
    assert float(core.cond) == pytest.approx(cond, rel=1e-3)
    assert (core.small is None) == plain
    assert bool(core.deficient) == (rcond == 1e-4 and not plain)
    assert int(core.rank) == 2


@pytest.mark.parametrize("sines", [(1e-7,), (1e-7, 1e-7), (1e-7,) * 8])
def test_the_shift_is_sixteen_times_the_rounding_of_the_normal_matrix(sines):
    core = core_of(pairs(*sines))
    assert core.normal.shift == pytest.approx(16 * (2 * len(sines)) ** 0.5 * EPS, rel=1e-3)


@pytest.mark.parametrize(
    ("damp", "angle", "needed"),
    [
        (1e-3, 1.0, []),
        (1e-8, 1.0, ["glimpse"]),
        (1e-8, 3e-5, ["glimpse", "smallest"]),
        (1e-8, 5.5e-6, ["glimpse", "largest", "smallest"]),
    ],
    ids=["damping", "glimpse", "smallest", "both"],
)
def test_the_condition_number_is_estimated_when_somebody_asks(damp, angle, needed, monkeypatch):
    """Damping says that it is small enough, or the smallest singular value, or the estimate."""
    asked = []
    for name in ("glimpse", "smallest", "largest"):
        estimate = getattr(_core, name)
        monkeypatch.setattr(
            _core, name, lambda *given, f=estimate, name=name: asked.append(name) or f(*given)
        )
    A = torch.randn(30, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A[:, 1] = A[:, 0] + angle * A[:, 1]
    B = StackedOp(DenseOp(A), torch.full((8,), damp, dtype=torch.float64))
    core = Core(B, 1e-14, None)
    before = sorted(asked)
    assert core.small is None  # the plain factor
    x, status, *_ = core.solve(torch.randn(38, 1, dtype=torch.float64), None)
    assert status.tolist() == [int(Status.DIRECT)]
    assert before == sorted(asked) == needed
    true = torch.linalg.cond(core.normal.B.dense())
    assert 0.7 * true <= core.cond <= 1.01 * true
    assert core.cond is core.cond
    assert sorted(asked) == ["glimpse", "largest", "smallest"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("sigma", [1.0, 1e-3, 1e-6])
def test_one_step_of_inverse_iteration_and_one_more(sigma, dtype):
    """From above, and within what is derived for the start that there is."""
    g = torch.Generator().manual_seed(5)
    A = torch.randn(3, 30, 8, generator=g, dtype=dtype)
    A[..., 1] = A[..., 0] + sigma * A[..., 1]
    normal = Normal(DenseOp(A))
    normal.factor()
    true = torch.linalg.svdvals(normal.B.dense())
    V = torch.linalg.svd(normal.B.dense())[2].mH
    xi = (V.mH @ _nullspace._random(normal, 1)).abs().squeeze(-1) ** 2
    v, seen = _nullspace.glimpse(normal)
    for steps, estimate in ((1, seen), (2, _nullspace.smallest(normal, v))):
        power = [(xi * true ** (k - 4 * steps)).sum(-1) for k in (2, 0)]
        torch.testing.assert_close(estimate, (power[0] / power[1]).sqrt(), rtol=1e-3, atol=0)
        R = xi[..., :-1].sum(-1) / xi[..., -1]
        bound = (1 + R ** (1 / (4 * steps))) * true[..., -1]
        assert bool(((true[..., -1] <= 1.001 * estimate) & (estimate <= bound)).all())


def test_what_is_easy_at_a_glimpse_needs_a_margin_of_ten(monkeypatch):
    monkeypatch.setattr(_core, "smallest", lambda *_: torch.tensor(0.0, dtype=torch.float64))
    A = torch.eye(9, 4, dtype=torch.float64)
    core = Core(DenseOp(A), 1e-14, None)
    seen = 2 / float(core._begun()[1])  # n^(1/2) over the estimate
    assert core._below(10.1 * seen) and not core._below(9.9 * seen)


@pytest.mark.parametrize("below", [0.995, 1.005])
def test_which_singular_values_count(below):
    rcond = 1e-5
    core = core_of(pairs(sine_for(below * rcond), 1.0), rcond)
    assert int(core.rank) == (3 if below < 1 else 4)
    assert bool(core.deficient)
    want = 1.0 if below < 1 else below * rcond
    assert float(core.cond) == pytest.approx(2**0.5 if below < 1 else 1 / want, rel=1e-3)


@pytest.mark.parametrize("below", [0.995, 1.005])
def test_full_rank_is_sure_ten_times_above_the_tolerance(below):
    """In the careful way too."""
    core = core_of(pairs(sine_for(below * 1e-7)), 1e-8)
    assert core.small is not None
    assert int(core.rank) == 2
    assert bool(core.deficient) == (below < 1)


@pytest.mark.parametrize("below", [0.997, 1.003])
def test_directions_are_corrected_where_the_shift_is_more_than_a_tenth(below):
    shift = 16 * 2 * EPS
    sine = below * (10 * shift) ** 0.5 / 0.7 * 2**0.5
    assert values(sine)[1] ** 2 == pytest.approx(10 * shift * below**2, rel=1e-6)
    core = core_of(pairs(sine, 1.0))
    assert core.small.sigma.numel() == (1 if below < 1 else 0)


@pytest.mark.parametrize("below", [0.997, 1.003])
def test_directions_are_known_to_twenty_times_the_tolerance(below):
    rcond = 1e-4
    core = core_of(pairs(sine_for(1e-7), sine_for(below * 20 * rcond)), rcond)
    assert core.small.sigma.numel() == (2 if below < 1 else 1)
    assert float(core.cond) == pytest.approx(1 / (below * 20 * rcond), rel=1e-3)


def test_to_what_the_singular_values_are_iterated(monkeypatch):
    """To the rank tolerance, below which they are all the same."""
    given, plain = [], _core.small_directions
    monkeypatch.setattr(_core, "small_directions", lambda *a: given.append(a) or plain(*a))
    core = core_of(pairs(1e-7, length=0.6), 1e-9)
    assert float(core.top) == pytest.approx(0.6 * 2**0.5)
    floor, most = given[0][2:]
    assert float(floor) == pytest.approx(0.6e-9 * 2**0.5, rel=1e-3)
    assert most == 2


def test_a_factor_is_doubted_after_more_than_three_corrections():
    core = core_of(pairs(1.0))
    assert not core._doubtful(torch.tensor([0, 3]))
    assert core._doubtful(torch.tensor([4, 0]))
    assert core_of(pairs(1e-7))._doubtful(torch.tensor([0]))


@pytest.mark.parametrize("size", [1.0, 2.0**-6])
@pytest.mark.parametrize(("ratio", "times"), [(9.95, 1), (10.05, 2)])
def test_null_vectors_of_uneven_length_are_sharpened_twice(ratio, times, size, monkeypatch):
    """One of length one, one that is longer by this ratio in the units of the columns."""
    # of the columns u and w u / 16, the null vector is (w, -1) scaled, and (w, -16) not
    w = ((256 - ratio**2) / (ratio**2 - 1)) ** 0.5
    A = np.zeros((6, 4))
    A[0, :2] = 0.7
    A[1, 2], A[1, 3] = 0.7, 0.7 * w / 16
    core = Core(DenseOp(torch.from_numpy(A * size)), 1e-12, None)
    np.testing.assert_array_equal(core.normal.scale.numpy() * size, [1, 1, 1, 16])
    assert int(core.rank) == 2
    nulls = np.zeros((4, 2))
    nulls[:2, 0] = 0.5**0.5, -(0.5**0.5)
    nulls[2:, 1] = np.array([w, -1]) / np.hypot(w, 1)
    core._nulls = torch.from_numpy(nulls)
    plain, count = core._sharpened, []
    monkeypatch.setattr(core, "_sharpened", lambda V: count.append(V) or plain(V))
    core._purify(torch.tensor([True, True]))
    assert len(count) == times
    unscaled = nulls * np.array([1, 1, 1, 16])[:, None]
    unscaled /= np.linalg.norm(unscaled, axis=0)
    np.testing.assert_allclose(np.abs(core.null.numpy().T @ unscaled), np.eye(2), atol=1e-14)


@pytest.mark.parametrize(("short", "bound"), [(2.0**-20, 5e-14), (2.0**-40, 1e-10)])
def test_null_vectors_of_short_columns_and_of_near_dependent_ones(short, bound):
    """Scaled, one is almost orthogonal to what it is unscaled, but not to itself."""
    rng = np.random.default_rng(0)
    u, d, e = rng.integers(-8, 9, (3, 10)) / 8
    near = short**0.5
    A = np.stack((d * short, u, u + d * near, e * short * 0.75, e * short), 1)
    null = np.array([[1, near, -near, 0, 0], [0, 0, 0, 1, -0.75]]).T
    assert not (A @ null).any()
    null /= np.linalg.norm(null, axis=0)
    core = Core(DenseOp(torch.from_numpy(A)), 1e-15, None, True)
    assert int(core.rank) == 3
    found = core.null.numpy()
    assert np.linalg.norm(null - found @ (found.T @ null)) <= bound


def test_uneven_null_vectors_beside_a_small_direction_that_is_none():
    """It is left out of them, as a column of zeros."""
    u, e, p, q = np.random.default_rng(0).integers(-8, 9, (4, 10)) / 8
    short = 2.0**-20
    A = np.stack((e * short * 0.75, e * short, u, u, p, p + 2.0**-27 * q), 1)
    null = np.array([[1, -0.75, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0]]).T
    null /= np.linalg.norm(null, axis=0)
    core = Core(DenseOp(torch.from_numpy(A)), 1e-12, None, True)
    assert int(core.rank) == 4
    assert core.small.sigma.numel() == 3
    found = core.null.numpy()
    assert not found[:, 2].any()
    assert np.linalg.norm(null - found @ (found.T @ null)) <= 1e-8
