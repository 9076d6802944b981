"""What cross_check holds answers to: what rounding must do to them, and not less."""

from __future__ import annotations

import numpy as np

from funclsq.validate import cross_check


def test_a_wide_problem_with_little_damping_is_not_held_to_what_no_solver_can_reach():
    """A has a null space, where its stacking with damp has singular values of 0.05: rounding of
    that matrix moves the hvp in damp by more than any rounding of the data does.
    """
    center, pixel = np.linspace(0, 39, 20)[:, None], np.arange(40)
    A = np.exp(-(((center - pixel) / 1.5) ** 2))
    b = A @ np.sin(pixel / 5) + 1e-3 * np.random.default_rng(0).standard_normal(20)
    report = cross_check(A, b, damp=0.05, oracles=["closed form", "autodiff"])
    assert report, report
    assert max(row.tolerance for row in report.rows) < 1e-8  # and it can still fail
