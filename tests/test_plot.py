"""The pictures show the data that they were given."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch

import funclsq as fl
from funclsq import plot
from funclsq.ridge import RidgePath, ridge_path
from funclsq.validate import Report, Row

figures = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    return figures.Figure().add_subplot()


@pytest.fixture
def descent():
    A = torch.randn(9, 3, dtype=torch.float64)
    b = torch.randn(9, dtype=torch.float64)
    return fl.solvers.gradient_descent(A, b, history=True, maxiter=20, on_failure="ignore")


def test_convergence_draws_the_history(ax, descent):
    assert plot.convergence(descent, ax, label="steps", rate=0.5) is ax
    line, bound = ax.lines
    expected = descent.history.normal_residual_norm.numpy()
    np.testing.assert_array_equal(line.get_xdata(), np.arange(21))
    np.testing.assert_array_equal(np.ravel(line.get_ydata()), expected)
    np.testing.assert_allclose(np.ravel(bound.get_ydata()), expected[0] * 0.5 ** np.arange(21))
    assert ax.get_ylabel() == "normal residual norm"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["steps"]


def test_convergence_draws_the_quantity_asked_for(ax, descent):
    plot.convergence(descent.history, ax, quantity="residual_norm")
    drawn = np.ravel(ax.lines[0].get_ydata())
    np.testing.assert_array_equal(drawn, descent.history.residual_norm.numpy())
    assert ax.get_ylabel() == "residual norm"


def test_convergence_draws_what_a_callback_collected(ax):
    A, b = torch.randn(30, 6, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)
    states = []
    fl.lstsq(A, b, solver="lsmr", callback=states.append)
    plot.convergence(states, ax)
    assert len(ax.lines) == 2  # one per column
    for column, line in enumerate(ax.lines):
        expected = [state["normal_residual_norm"][column] for state in states]
        np.testing.assert_array_equal(line.get_ydata(), expected)
    assert ax.lines[0].get_xdata()[0] == states[0]["iteration"]


def test_convergence_draws_numbers(ax):
    plot.convergence([4.0, 2.0, 1.0], ax)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(np.ravel(ax.lines[0].get_ydata()), [4, 2, 1])


def test_convergence_without_a_history_says_so(ax):
    A = torch.eye(3, 2)
    with pytest.raises(ValueError, match="history=True"):
        plot.convergence(fl.solvers.gradient_descent(A, torch.ones(3)), ax)
    with pytest.raises(ValueError, match="must have one value per step; got none"):
        plot.convergence([], ax)


ENTRIES = ([0, 1, 2, 2], [0, 1, 0, 1])
DENSE = np.array([[1.0, 0], [0, 2], [3, 4]])


@pytest.mark.parametrize(
    "A",
    [
        fl.SparsityPattern(*ENTRIES, (3, 2)),
        fl.Sparse(fl.SparsityPattern(*ENTRIES, (3, 2)), torch.ones(4)),
        torch.from_numpy(DENSE).to_sparse_coo(),
        torch.from_numpy(DENSE).to_sparse_csc(),
        torch.from_numpy(DENSE),
        scipy.sparse.csr_array(DENSE),
        DENSE,
    ],
    ids=["pattern", "Sparse", "COO", "CSC", "dense", "scipy", "numpy"],
)
def test_sparsity_draws_every_entry(ax, A):
    plot.sparsity(A, ax)
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array().filled(0), DENSE != 0)
    assert tuple(image.get_extent()) == (-0.5, 1.5, 2.5, -0.5)
    assert ax.get_title() == "3 x 2, 4 entries (67%)"


def test_sparsity_of_a_large_matrix_counts(ax):
    n = 5000
    A = scipy.sparse.eye_array(n) + scipy.sparse.coo_array(([1.0], ([0], [n - 1])), (n, n))
    plot.sparsity(A, ax)
    counts = ax.images[0].get_array().filled(0)
    assert counts.shape == (256, 256)
    assert counts.sum() == n + 1
    assert counts[0, -1] == 1
    assert np.count_nonzero(counts - np.diag(np.diag(counts))) == 1


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 2)])
def test_sparsity_of_nothing(ax, shape):
    plot.sparsity(torch.zeros(shape), ax)
    assert ax.get_title().startswith(f"{shape[0]} x {shape[1]}, 0 entries")


def test_sparsity_of_a_batch_is_refused(ax):
    with pytest.raises(ValueError, match="one matrix"):
        plot.sparsity(torch.ones(2, 3, 4), ax)


def rows(*errors):
    return tuple(Row(name, "torch", "svd", error, 1e-13, "") for name, error in zip("xyzw", errors))


def test_agreement_draws_errors_and_bounds(ax):
    plot.gradient_agreement(Report("two", rows(1e-15, 1e-14)), ax)
    bounds, good = ax.collections
    np.testing.assert_allclose(bounds.get_offsets(), [[1e-13, 0], [1e-13, 1]])
    np.testing.assert_allclose(good.get_offsets(), [[1e-15, 0], [1e-14, 1]])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["x", "y"]
    assert ax.get_title() == "all 2 comparisons within their bounds"


def test_agreement_shows_what_failed(ax):
    plot.gradient_agreement(Report("four", rows(1e-15, 1e-3, np.inf, np.nan)), ax)
    bad = ax.collections[2]
    assert bad.get_label() == "beyond it"
    offsets = bad.get_offsets()
    np.testing.assert_array_equal(offsets[:, 1], [1, 2, 3])
    assert offsets[0, 0] == pytest.approx(1e-3)
    left, right = ax.get_xlim()
    assert (offsets[1:, 0] > 1e-3).all()
    assert ((offsets[:, 0] > left) & (offsets[:, 0] < right)).all()
    assert ax.get_title() == "3 of 4 beyond their bounds"


def test_agreement_shows_an_error_of_zero(ax):
    plot.gradient_agreement(Report("zero", rows(0.0)), ax)
    assert ax.get_xlim()[0] < ax.collections[1].get_offsets()[0, 0] < 1e-13


def test_agreement_of_nothing_is_refused(ax):
    with pytest.raises(ValueError, match="must have rows; got none"):
        plot.gradient_agreement(Report("none", ()), ax)


def hyperbola(vertex):
    """Log residual u, log solution norm v with (u + v)/2 = sqrt(1 + s^2): bends most at s = 0."""
    s = torch.linspace(-3, 3, 61, dtype=torch.float64)
    u, v = (1 + s**2).sqrt() + s, (1 + s**2).sqrt() - s
    return RidgePath((s + vertex).exp(), s.unsqueeze(1), u.exp(), v.exp())


def test_the_corner_is_where_the_curve_bends_most():
    path = hyperbola(-2.0)
    assert path.corner == 30
    # of v - u = -2 s, u + v = 2 sqrt(1 + s^2), a rectangular hyperbola of half-axis sqrt(2)
    assert float(path.curvature[30]) == pytest.approx(1 / 2**0.5, rel=0.02)


def test_l_curve_draws_the_path_and_its_corner(ax):
    path = hyperbola(-2.0)
    plot.l_curve(path, ax)
    line, dot = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), path.residual_norm)
    np.testing.assert_array_equal(line.get_ydata(), path.solution_norm)
    assert float(dot.get_xdata()[0]) == float(path.residual_norm[30])
    assert "corner: damp 0.14" in [text.get_text() for text in ax.texts]


def ill_posed(sparse):
    i = torch.arange(20, dtype=torch.float64)
    A = torch.exp(-(((i[:, None] - i[None, :]) / 3) ** 2))
    b = A @ torch.sin(i / 4) + 1e-3 * torch.randn(20, dtype=torch.float64)
    return (fl.Sparse.from_torch(A) if sparse else A), A, b


@pytest.mark.parametrize("sparse", [False, True])
def test_ridge_path_solves_at_every_damping(sparse):
    A, dense, b = ill_posed(sparse)
    x0, w = torch.randn(20, dtype=torch.float64), 0.5 + torch.rand(20, dtype=torch.float64)
    damp = torch.logspace(-3, 1, 9, dtype=torch.float64)
    path = ridge_path(A, b, damp, x0=x0, weights=w)
    for i, d in enumerate(damp):
        gradient = dense.T @ (w * (dense @ path.x[i] - b)) + d**2 * (path.x[i] - x0)
        assert float(gradient.norm()) < 1e-11
        r = w.sqrt() * (dense @ path.x[i] - b)
        assert float(path.residual_norm[i]) == pytest.approx(float(r.norm()), rel=1e-9)
        assert float(path.solution_norm[i]) == pytest.approx(float((path.x[i] - x0).norm()))


def test_the_corner_of_an_ill_posed_problem_is_a_sensible_damping():
    A, _, b = ill_posed(False)
    i = torch.arange(20, dtype=torch.float64)
    path = ridge_path(A, b, torch.logspace(-7, 1, 81, dtype=torch.float64))
    truth = torch.sin(i / 4)
    errors = (path.x - truth).norm(dim=1) / truth.norm()
    assert float(errors[path.corner]) < 0.1
    assert float(errors[0]) > 100
    assert float(errors[-1]) > 0.5


def test_ridge_path_is_differentiable():
    A, _, b = ill_posed(False)
    damp = torch.logspace(-1, 1, 5, dtype=torch.float64)
    slope = torch.func.grad(lambda d: ridge_path(A, b, d).solution_norm.sum())(damp)
    h = 1e-6 * torch.eye(5, dtype=torch.float64)
    up, down = (ridge_path(A, b, damp + s * h[2]).solution_norm.sum() for s in (1, -1))
    assert float(slope[2]) == pytest.approx(float(up - down) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("damp", [[1.0, 2.0], [0.0, 1, 2, 3, 4], [5.0, 4, 3, 2, 1], [[1.0]]])
def test_ridge_path_refuses_other_dampings(damp):
    with pytest.raises(ValueError, match="increasing"):
        ridge_path(torch.eye(3), torch.ones(3), torch.tensor(damp))


def test_ridge_path_refuses_a_block():
    with pytest.raises(ValueError, match="vector"):
        ridge_path(torch.eye(3), torch.ones(3, 2), torch.logspace(-1, 1, 5))


def test_without_axes_a_new_figure_is_made():
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    ax = plot.sparsity(DENSE)
    assert ax.figure.number in plt.get_fignums()
    assert dict(plt.rcParams) == before
    plt.close(ax.figure)


def test_without_matplotlib_the_error_names_the_command():
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from funclsq import plot\n"
        "try:\n    plot.convergence([1.0, 0.5])\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'funclsq[plot]'" in done.stdout, done.stderr


def test_ridge_path_takes_one_problem_of_torch_or_numpy():
    A, b, x0 = (torch.randn(*s, dtype=torch.float64) for s in ((8, 3), (8,), (3,)))
    damp = torch.logspace(-3, 1, 9, dtype=torch.float64)
    path = ridge_path(A, b, damp, x0=x0)
    same = ridge_path(A.numpy(), b.numpy(), damp.numpy(), x0=x0.numpy())
    torch.testing.assert_close(path.x, same.x)
    torch.testing.assert_close(path.solution_norm, same.solution_norm)
    with pytest.raises(ValueError, match=r"batch dimensions \(2,\)"):
        ridge_path(torch.stack((A, A)), b, damp)
