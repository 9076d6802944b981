"""The directions in which a matrix is small: all of them are found, and at a small cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_core import planted

from funclsq.methods import _nullspace
from funclsq.methods._normal import Normal
from funclsq.methods._nullspace import small_directions
from funclsq.operators import DenseOp

EPS = 2.0**-52
SHIFT = 1e-12


def spectrum(*small, fair):
    """These singular values, and so many fair ones that make columns of length 0.7."""
    n = len(small) + fair
    return np.array([*small, *(n / (2 * fair)) ** 0.5 * np.linspace(0.9, 1.1, fair)])


def search(sigma, limit=1e-5, floor=1e-12, most=None, shift=SHIFT):
    """What is found of planted singular values, and how many columns each solve had."""
    A, V = planted(sigma, len(sigma) + 3)
    normal = Normal(DenseOp(torch.from_numpy(A)))
    assert bool((normal.scale == 1).all())
    normal.factor(shift)
    plain, widths = normal.solve, []
    normal.solve = lambda q: widths.append(q.shape[-1]) or plain(q)
    limit, floor = (torch.tensor(t, dtype=torch.float64) for t in (limit, floor))
    small = small_directions(normal, limit, floor, len(sigma) if most is None else most)
    return small, widths, V


def check_found(small, V, sigma, close=1e-8):
    """Ascending values, and an orthonormal basis of their directions."""
    k = len(sigma)
    np.testing.assert_allclose(small.sigma.numpy(), np.sort(sigma), rtol=0.1, atol=1e-12)
    basis = small.V.numpy()
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(k), atol=1e-13)
    left = basis - V[:, :k] @ (V[:, :k].conj().T @ basis)
    assert np.linalg.norm(left) <= close


@pytest.mark.parametrize("small", [0.0, 1e-8])
@pytest.mark.parametrize("count", [0, 1, 5, 20, 40])
def test_the_first_block_holds_all_small_directions_and_few_more(count, small):
    sigma = spectrum(*[small] * count, fair=110 - count)
    found, widths, V = search(sigma)
    check_found(found, V, sigma[:count])
    assert found.complete
    block = widths[-1]
    assert count < block <= 1.5 * count + 4 * count**0.5 + 8
    assert widths[:2] == [8, block - 8]  # a sample to count with, and the rest
    assert widths[2:] == [block] * len(widths[2:])
    assert len(widths) <= 5
    assert float(found.next) == pytest.approx(sigma[len(found.sigma)], rel=0.1)


@pytest.mark.parametrize("count", [1, 3])
def test_a_cluster_beyond_the_limit_does_not_hide_what_is_below(count):
    """The block holds part of it only, so that the null space comes out in several steps."""
    sigma = spectrum(*[0.0] * count, *[4e-6] * 60, fair=40)
    found, widths, V = search(sigma, limit=3.5e-6)
    check_found(found, V, sigma[:count], close=1e-6)
    assert widths[-1] < 60
    assert float(found.next) == pytest.approx(4e-6, rel=0.1)


def test_what_is_below_the_limit_stands_to_a_tenth():
    """It falls towards 1e-7 by ever less, at last from 1.4 times that."""
    found, _, _ = search(spectrum(1e-7, *[4e-6] * 60, fair=40), limit=3.5e-6, shift=1e-11)
    assert float(found.sigma[0]) == pytest.approx(1e-7, rel=0.1)


def test_what_is_above_the_limit_need_not_stand():
    sigma = spectrum(0.0, *np.linspace(4e-6, 4e-4, 60), fair=40)
    _, widths, _ = search(sigma, limit=1e-6)
    assert len(widths) <= 7


def test_so_many_steps_are_made_at_most(monkeypatch):
    monkeypatch.setattr(_nullspace, "_STEPS", 4)
    sigma = spectrum(0.0, fair=20)
    assert len(search(sigma, floor=-1.0)[1]) == 2 + 4


def test_the_block_grows_until_it_is_enough():
    """The shift is far below the limit, so that the sample counts few of those between."""
    sigma = spectrum(*np.geomspace(1e-5, 9e-5, 40), fair=70)
    found, widths, V = search(sigma, limit=1e-4)
    check_found(found, V, sigma[:40], close=1e-6)
    assert found.complete
    assert float(found.next) == pytest.approx(sigma[len(found.sigma)], rel=0.1)
    blocks = [widths[0] + widths[1]]
    while blocks[-1] <= 40:  # as many more are added, of which the first steps are part
        blocks.append(2 * blocks[-1])
    assert sorted(set(widths[2:])) == blocks
    assert all(2 <= widths.count(block) <= 4 for block in blocks)


def test_the_last_block_is_the_whole_space():
    """Every unit vector, with no more solves."""
    sigma = spectrum(fair=36)
    found, widths, V = search(sigma, limit=2.0, shift=1e-2)
    check_found(found, V, sigma)
    np.testing.assert_allclose(found.sigma.numpy(), np.sort(sigma), rtol=1e-13)
    assert found.complete
    assert float(found.next) == np.inf
    assert 18 < widths[-1] < 36


@pytest.mark.parametrize(("length", "top"), [(1e-3, 1.0), (1e3, 1e3)])
def test_what_is_far_below_rounding_is_left_out_where_lapack_fails(length, top, monkeypatch):
    """Beside the largest of vectors longer than one, otherwise beside one."""
    tiny = EPS**3 * top
    block = np.array([[[length, 1.003 * tiny, 0.997 * tiny], [0.5 * length, 1e-3, 0]]] * 2)
    plain, given = torch.linalg.qr, []

    def fails_once(V, mode):
        given.append(V.clone())
        Q, R = plain(V, mode=mode)
        return (Q, R * torch.nan) if len(given) == 1 else (Q, R)

    monkeypatch.setattr(torch.linalg, "qr", fails_once)
    block[1] /= 2  # members are judged on their own
    _nullspace.qr(torch.from_numpy(block))
    want = block.copy()
    want[0, 0, 2] = want[1, 0, 2] = 0
    if top == 1:
        want[1, 0, 1] = 0
    np.testing.assert_array_equal(given[0].numpy(), block)
    np.testing.assert_array_equal(given[1].numpy(), want)


def test_a_block_that_may_not_grow_is_told():
    sigma = spectrum(*np.geomspace(1e-5, 9e-5, 40), fair=70)
    found, widths, V = search(sigma, limit=1e-4, most=25)
    assert not found.complete
    assert float(found.next) == np.inf
    assert found.sigma.numel() == widths[-1] == 25
    assert 25 - max(w for w in widths if w < 25) in widths  # so many were added
