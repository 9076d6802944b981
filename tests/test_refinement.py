"""Refinement decides by the sizes of its corrections: when to stop, and what to call the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from funclsq import passes
from funclsq.methods import _refine
from funclsq.methods._needless import Foresight, norms
from funclsq.operators import DenseOp, SparseOp
from funclsq.pattern import SparsityPattern
from funclsq.solution import Status

EPS = 2.0**-52
DIRECT, INACCURATE = int(Status.DIRECT), int(Status.INACCURATE)


class Script:
    """Corrections of these sizes, one column for each; ``powers`` are those of B dx, if others.

    An image is not summed up, but has the size ``length`` throughout.
    """

    def __init__(self, *columns, powers=None, image=False, length=1.0):
        self.sizes = np.array(columns).T
        self.powers = self.sizes if powers is None else np.array(powers).T
        self.image, self.length = image, length
        self.at = -1

    def pair(self):
        """What is measured itself, |dx| or of an image |q|, and its other factor in <dx, q>."""
        size, power = (torch.from_numpy(t[self.at][None]) for t in (self.sizes, self.powers))
        return size, torch.where(size == 0, 0, power**2 / size)

    def residual(self, x):
        self.at += 1
        return self.pair()[not self.image]

    def rough(self, q):
        return self.pair()[self.image]

    def start(self, dx):
        return torch.full_like(dx, self.length) if self.image else dx

    def step(self, x, dx):
        return x if self.image else x + dx

    def run(self, energy=False, eps=EPS, unit=1.0, known=None):
        B = DenseOp(unit * torch.tensor([[0.6], [0.8]], dtype=torch.float64))

        def whole(x):
            return norms(x if self.image else B.mv(x)) if energy else None

        kind = "image" if self.image else "g" if energy else "c"
        return _refine._iterate(
            B, self.rough, self.residual, self.step, self.start, whole, eps, kind, known
        )


def test_script():
    script = Script([1.0, 1e-3], [2.0, 1e-4], powers=[[3.0, 1e-2], [4.0, 1e-5]])
    q = script.residual(None)
    np.testing.assert_allclose(_refine._power(script.rough(q), q), [3.0, 4.0])
    np.testing.assert_allclose(script.rough(q)[0].numpy(), [1.0, 2.0])


def expected(*columns, **options):
    """Corrections made and status of each column."""
    script = Script(*columns)
    x, status, steps = script.run(**options)
    for j, k in enumerate(steps.tolist()):
        assert x[0, j] == pytest.approx(sum(columns[j][: k + 1]), rel=1e-15)
    return list(zip(steps.tolist(), status.tolist(), strict=True))


def falling(rate, first=1.0, count=15):
    return [first * rate**k for k in range(count)]


@pytest.mark.parametrize("energy", [False, True])
def test_the_last_correction_is_that_after_which_the_next_would_not_count(energy):
    """Correction k has the size rate^k of x about 1; the next would be below eps / 4."""
    rates = [2.0**-27, 2.0**-10, 2.0**-6, 2.0**-5, 2.0**-4]
    want = [(k, DIRECT) for k in (1, 5, 8, 10, 13)]
    assert expected(*map(falling, rates), energy=energy) == want


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize(("margin", "steps"), [(1.003, 1), (0.997, 2)])
def test_a_quarter_of_eps_is_what_does_not_count(margin, steps, energy):
    eps = 4 * 2.0**-24 * margin
    assert expected(falling(2.0**-12), energy=energy, eps=eps) == [(steps, DIRECT)]


@pytest.fixture
def inner(monkeypatch):
    """The inner iteration takes the next correction as it comes; how often it was called."""
    calls = []

    def stand_in(B, rough, q):
        calls.append(q)
        return rough(q)

    monkeypatch.setattr(_refine, "_conjugate_gradients", stand_in)
    return calls


@pytest.mark.parametrize(
    ("column", "steps", "status", "inner_steps"),
    [
        ([1.0, 0.0], 1, DIRECT, 0),
        ([0.0], 0, DIRECT, 0),
        ([1.0, 1e-4, 0.702e-4], 1, DIRECT, 0),  # it falls no more: rounding, left out
        ([1.0, 1e-4, 0.698e-4, 0.0], 3, DIRECT, 1),
        ([1.0, 0.01, 1e-6, 1e-5], 2, DIRECT, 0),  # it grows: left out
        ([1.0, 0.298, 0.0], 2, DIRECT, 0),
        ([1.0, 0.302, 0.0], 2, DIRECT, 1),  # too slow for plain refinement
        ([1.0, 0.302, 0.302 * 0.29, 0.0], 3, DIRECT, 2),  # and so it is from then on
        (falling(0.28), 14, DIRECT, 0),
        (falling(0.5), 14, INACCURATE, 13),  # small at last, but never fast
        (falling(2.0), 14, INACCURATE, 13),  # and no rounding before it was
        ([1.0, 0.1, 0.998e-3 * 1.1, 1.0], 2, DIRECT, 0),  # beside x = 1.1
        ([1.0, 0.1, 1.002e-3 * 1.1, 1.0], 2, INACCURATE, 0),
        ([1.0, np.nan], 0, INACCURATE, 0),
        ([1.0, 1e-4, np.nan], 1, DIRECT, 0),
        ([1.0, 1e-4, np.inf], 1, DIRECT, 0),
        ([1.0, 1e-100, 1e150], 1, DIRECT, 0),  # its growth times its size leaves the range
        ([np.inf], 0, int(Status.NONFINITE), 0),
    ],
)
@pytest.mark.parametrize("energy", [False, True])
def test_what_each_sequence_of_corrections_leads_to(
    column, steps, status, inner_steps, energy, inner
):
    """Beside it a column that is done after one correction, and one that takes five."""
    column = [*column, *[np.nan] * (15 - len(column))]
    beside = falling(2.0**-27), falling(2.0**-10)
    got = expected(column, *beside, energy=energy)
    assert got == [(steps, status), (1, DIRECT), (5, DIRECT)]
    assert len(inner) == inner_steps


QUICK, SLOW, STEADY = 2.0**-27, 2.0**-5, 2.0**-10


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    ("plain", "power", "steps"),
    [(QUICK, QUICK, 1), (QUICK, STEADY, 5), (STEADY, QUICK, 5), (STEADY, SLOW, 10)],
)
def test_with_g_both_x_and_its_image_are_to_be_right(plain, power, steps, image):
    script = Script(falling(plain), powers=[falling(power)], image=image)
    _, status, made = script.run(energy=True)
    assert (made.tolist(), status.tolist()) == ([steps], [DIRECT])


@pytest.mark.parametrize(
    ("image", "unit", "length", "steps"),
    [
        (False, 1.0, 1.0, 5),
        (False, 2.0**10, 1.0, 4),  # B x is 2^10, x still 1
        (False, 2.0**-10, 1.0, 6),
        (True, 2.0**10, 1.0, 5),
        (True, 1.0, 2.0**-10, 6),
        (True, 1.0, 2.0**10, 4),
    ],
)
def test_the_power_of_a_correction_is_judged_beside_the_image(image, unit, length, steps):
    script = Script(falling(QUICK), powers=[falling(STEADY)], image=image, length=length)
    _, status, made = script.run(energy=True, unit=unit)
    assert (made.tolist(), status.tolist()) == ([steps], [DIRECT])


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("first", [2.0**-20, 1.0, 2.0**20])
def test_the_size_of_a_correction_is_judged_beside_the_first(image, first):
    script = Script(falling(STEADY, first), powers=[falling(QUICK)], image=image)
    _, status, made = script.run(energy=True)
    assert (made.tolist(), status.tolist()) == ([5], [DIRECT])


@pytest.mark.parametrize("image", [False, True])
def test_with_g_rounding_is_what_falls_in_neither_measure(image, inner):
    """The second correction is left out if both have stopped falling; one is enough to go on."""
    fallen, stuck = [1.0, 1e-5, 1e-10, 0.0], [1.0, 1e-5, 0.9e-5, 0.0]
    for plain, power, steps in ((stuck, stuck, 1), (fallen, stuck, 3), (stuck, fallen, 3)):
        plain, power = ([*t, *[0.0] * 12] for t in (plain, power))
        got = Script(plain, powers=[power], image=image).run(energy=True)
        assert (got[2].tolist(), got[1].tolist()) == ([steps], [DIRECT])


@pytest.mark.parametrize("image", [False, True])
def test_what_is_zero_at_once_is_not_corrected(image):
    """A solution of no length; an image of no power, whatever the right-hand side."""
    nothing, some = [0.0] * 15, falling(STEADY)
    script = Script(some if image else nothing, powers=[nothing if image else some], image=image)
    _, status, steps = script.run(energy=image)
    assert (steps.tolist(), status.tolist()) == ([0], [DIRECT])


def test_the_power_is_the_length_of_the_image():
    rng = np.random.default_rng(0)
    B, dx = (rng.standard_normal(s) + 1j * rng.standard_normal(s) for s in ((6, 4), (4, 3)))
    power = _refine._power(torch.from_numpy(dx), torch.from_numpy(B.conj().T @ B @ dx))
    np.testing.assert_allclose(power, np.linalg.norm(B @ dx, axis=0), rtol=1e-14)


def conjugate_gradients(q):
    """The powers <P q, q> of the residuals that were met on the way."""
    B = DenseOp(torch.diag(torch.tensor([1.0, 0.7, 0.4, 0.2], dtype=torch.float64)))
    powers = []

    def rough(q):
        powers.append(float(q.square().sum()))
        return q

    _refine._conjugate_gradients(B, rough, q)
    return powers


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_when_conjugate_gradients_stop(size, monkeypatch):
    q = size * torch.ones((4, 1), dtype=torch.float64)
    monkeypatch.setattr(_refine, "_DROP", 0.0)
    powers = conjugate_gradients(q)
    for margin, more in ((1.003, 0), (0.997, 1)):
        monkeypatch.setattr(_refine, "_DROP", (margin * powers[2] / powers[0]) ** 0.5)
        assert len(conjugate_gradients(q)) == 3 + more
    monkeypatch.setattr(_refine, "_DROP", 0.0)
    monkeypatch.setattr(_refine, "_INNER", 2)
    assert len(conjugate_gradients(q)) == 3


def test_with_the_inverse_one_correction_is_enough():
    """Of the solution, of the image, and of an image of which a part is corrected at once."""
    rng = np.random.default_rng(0)
    A, c, g = (torch.from_numpy(rng.standard_normal(s)) for s in ((9, 4), (9, 2), (4, 2)))
    B, inverse = DenseOp(A), torch.linalg.inv(A.mT @ A)
    for of_c, of_g in ((c, None), (None, g), (c, g)):
        want = inverse @ ((0 if of_c is None else A.mT @ c) + (0 if of_g is None else g))
        x, status, steps, _ = _refine.refine(B, lambda q: inverse @ q, of_c, of_g, EPS)
        torch.testing.assert_close(x, want)
        assert (steps.tolist(), status.tolist()) == ([1, 1], [DIRECT, DIRECT])
    for fine in (None, lambda q: inverse @ q):
        y, status, steps = _refine.refine_image(B, lambda q: inverse @ q, fine, g, EPS)
        torch.testing.assert_close(y, A @ inverse @ g)
        assert (steps.tolist(), status.tolist()) == ([1, 1], [DIRECT, DIRECT])


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize(
    ("goal", "corrections"), [(4.2e-8, 1), (3.8e-8, 2), (4.2e-12, 2), (3.8e-12, 3)]
)
def test_no_correction_is_made_that_is_foretold_to_be_a_quarter_of_the_goal(
    goal, corrections, image
):
    """Each is 1e-4 of the one before, and the first 1e-4 of the solution."""
    rng = np.random.default_rng(1)
    A, g = (torch.from_numpy(rng.standard_normal(s)) for s in ((9, 4), (4, 2)))
    A = torch.linalg.qr(A).Q  # the inverse of A^H A is the identity
    B = DenseOp(A)

    def rough(q):
        return (1 - 1e-4) * q

    if image:
        x, status, steps = _refine.refine_image(B, rough, None, g, goal)
    else:
        x, status, steps, _ = _refine.refine(B, rough, None, g, goal)
    assert steps.tolist() == [corrections, corrections]
    assert status.tolist() == [DIRECT, DIRECT]
    far = float((x - (A @ g if image else g)).norm() / g.norm())
    assert far <= 2 * max(1e-4 ** (corrections + 1), EPS)


# Where a lower bound of the singular values tells that no correction is needed


def loosely(floor):
    return Foresight(np.asarray(floor), EPS, True)


def leaves_out(sizes, powers, goal, floor, image=False, energy=False, length=1.0):
    """Whether no correction is made to a solution, or an image, of this length."""
    script = Script(sizes, powers=[powers], image=image, length=length)
    _, status, steps = script.run(energy=energy, eps=goal, known=loosely(floor))
    assert status.tolist() == [DIRECT]
    assert script.at == (1 if steps.item() == 0 else steps.item())
    return steps.item() == 0


@pytest.mark.parametrize("goal", [1e-12, 1e-6])
@pytest.mark.parametrize("floor", [1.0, 1e-2])
def test_a_first_correction_is_left_out_where_the_residual_bounds_it(goal, floor):
    # sizes of dx and of <dx, q>^(1/2); |q| is then power^2 / size
    for part, left_out in ((0.99, True), (1.01, False)):
        q = part * 0.25 * goal * floor**2  # |x| = 1
        size = 0.5 * goal * q
        assert leaves_out([1.0, size], [1.0, (q * size) ** 0.5], goal, floor) == left_out


@pytest.mark.parametrize("floor", [1.0, 1e-2])
def test_with_a_right_hand_side_in_the_domain_the_image_counts_too(floor):
    goal = 1e-9
    for part, left_out in ((0.99, True), (1.01, False)):
        # |B x| = |x| = 1 here, so that |q| / floor^2 is the greater of the two bounds
        q = part * 0.25 * goal * floor**2
        size = 0.5 * goal * q
        powers = [1.0, (q * size) ** 0.5]
        assert leaves_out([1.0, size], powers, goal, floor, energy=True) == left_out


@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("kind", ["c", "g", "both"])
def test_the_image_of_a_solution_without_corrections_comes_with_it(kind, passing, monkeypatch):
    if passing:
        pytest.importorskip("numba")
    monkeypatch.setattr(passes, "LEAST", 0 if passing else 1 << 60)
    rng = np.random.default_rng(0)
    A = torch.from_numpy(np.linalg.qr(rng.standard_normal((9, 4)))[0])
    S = SparsityPattern(*np.divmod(np.arange(36), 4), (9, 4))
    B = SparseOp(S, A.reshape(-1))
    c, g = (torch.from_numpy(rng.standard_normal((k, 1))) for k in (9, 4))
    c, g = None if kind == "g" else c, None if kind == "c" else g
    assert (_refine._passes(B, c, g) is None) == (kind == "both" or not passing)
    x, _, steps, image = _refine.refine(B, lambda q: q, c, g, 1e-9, loosely(0.9))
    assert steps.tolist() == [0]
    torch.testing.assert_close(image, A @ x if c is None else A @ x - c, rtol=1e-13, atol=1e-13)
    *_, steps, image = _refine.refine(B, lambda q: 1.001 * q, c, g, 1e-9, loosely(0.9))
    assert steps.item() > 0 and image is None


# Where the backward error tells it


def planted(response=None):
    """An operator, a rough inverse that is right to 1e-15, and what is known of both."""
    rng = np.random.default_rng(2)
    A = torch.from_numpy(np.linalg.qr(rng.standard_normal((9, 4)))[0])
    known = Foresight(np.asarray(0.9), EPS, False)
    known.response = response
    return DenseOp(A), lambda q: (1 - 0.5 * EPS) * q, known, rng


@pytest.mark.parametrize("kind", ["c", "g", "both"])
def test_only_a_solve_with_c_shows_it_and_only_one_without_leaves_a_correction_out(kind):
    B, rough, known, rng = planted()
    c, g = (torch.from_numpy(rng.standard_normal((k, 2))) for k in (9, 4))
    c, g = None if kind == "g" else c, None if kind == "c" else g
    *_, steps, _ = _refine.refine(B, rough, c, g, EPS, known)
    assert steps.tolist() == [1, 1]
    assert (known.response is None) == (kind == "g")
    known.response = np.asarray([1.0])
    x, status, steps, image = _refine.refine(B, rough, c, g, EPS, known)
    assert status.tolist() == [DIRECT, DIRECT]
    assert steps.tolist() == ([0, 0] if kind == "g" else [1, 1])
    if kind == "g":
        torch.testing.assert_close(image, B.mv(x), rtol=1e-14, atol=1e-14)


def test_what_is_seen_is_how_long_the_image_of_a_correction_is_beside_its_residual():
    rng = np.random.default_rng(3)
    A, c = (torch.from_numpy(rng.standard_normal(s)) for s in ((9, 4), (9, 1)))
    B, inverse = DenseOp(A), torch.linalg.inv(A.mT @ A)
    rough, known = (lambda q: 1.001 * inverse @ q), Foresight(np.asarray(1e-3), EPS, False)
    _refine.refine(B, rough, c, None, EPS, known)
    x = rough(A.mT @ c)
    q = A.mT @ (c - A @ x)
    want = (A @ rough(q)).norm() / q.norm()
    np.testing.assert_allclose(known.response, [want], rtol=1e-2)


def test_an_image_is_corrected_all_the_same():
    B, rough, known, rng = planted(np.asarray([1.0]))
    g = torch.from_numpy(rng.standard_normal((4, 1)))
    assert _refine.refine(B, rough, None, g, EPS, known)[2].tolist() == [0]
    assert _refine.refine_image(B, rough, None, g, EPS, known)[2].tolist() == [1]
