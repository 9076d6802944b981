"""How far from an oracle a right answer may be: a multiple of what rounding of the data does.

No method can give an answer more accurately than the data determine it. So the oracle is asked
again at data that differ by random relative amounts of the size of the unit roundoff, and a
candidate may differ from it by ``factor`` times what that changes, and by at least ``factor``
unit roundoffs. The change is measured at larger perturbations and scaled down, which frees it
from the oracle's own rounding. What a backward stable solver of a damped problem rounds is the
stacked matrix [W^(1/2) A; D], its zeros too, so that this matrix is moved as well there.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from funclsq.validate.estimate import Estimate
from funclsq.validate.problem import Arrays, Problem
from funclsq.validate.tangents import Directions

__all__ = ["CAP", "Allowance", "Sensitivity", "floors", "perturbation"]

CAP = 5e-3  # a tolerance above this could not see a factor of 1.01
_OWN = 10  # times an oracle's error estimate


@dataclasses.dataclass(frozen=True)
class Allowance:
    """What one comparison is held to: errors are divided by ``scale``."""

    scale: float
    tolerance: float
    reason: str


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The answers of one oracle at the data and at perturbed data.

    Parameters
    ----------
    base : dict of str to array
        The answers at the data.
    moved : list of dict
        The answers at data perturbed by ``size``, relatively.
    size : float
        Of the perturbations.
    eps : float
        Unit roundoff of the candidates' dtype.
    floors : dict of str to float
        Natural size of quantities that may vanish, to divide errors by where they do.
    """

    base: Arrays
    moved: list[Arrays]
    size: float
    eps: float
    floors: dict[str, float]

    def allow(self, name: str, estimate: Estimate, factor: float) -> Allowance | None:
        """Return what a candidate's quantity is held to against an oracle's estimate of it.

        None if the oracle's own error is too large for the comparison to mean anything.
        """
        base = estimate.of(self.base[name])
        change = max(float(np.linalg.norm(estimate.of(p[name]) - base)) for p in self.moved)
        change *= self.eps / self.size
        scale = max(float(np.linalg.norm(base)), self.floors.get(name, 0.0))
        if estimate.along is not None:
            each = estimate.along.reshape(len(estimate.along), -1)
            typical = np.linalg.norm(self.base[name]) / np.sqrt(max(each.shape[1], 1))
            scale = max(scale, float(np.linalg.norm(each) * typical))
        if scale == 0:
            return Allowance(1.0, _OWN * estimate.error, "exactly zero")
        own = _OWN * estimate.error / scale
        if not own <= CAP:
            return None
        relative = change / scale
        if relative > self.eps:
            reason = f"{factor:g} x {relative:.0e}, the oracle's change under data (1 + eps)"
        else:
            reason = f"{factor:g} eps"
        tolerance = factor * max(relative, self.eps) + own
        if own > factor * max(relative, self.eps):
            reason = f"{_OWN} x the oracle's own error estimate"
        if tolerance > CAP:
            tolerance, reason = CAP, f"capped; the data fix it to {relative:.0e} only"
        return Allowance(scale, tolerance, reason)


def perturbation(cond: float) -> float:
    """Return a size of perturbations that the answers follow linearly."""
    return max(min(1e-8, 1e-3 / cond), np.finfo(float).eps)


def floors(problem: Problem, d: Directions, base: Arrays, cond: float) -> dict[str, float]:
    """Return the natural size of the quantities that vanish for some problems.

    x does not depend on x0 where it is unique and undamped; it does not depend on the weights
    where the residual is zero; and ``vjp b`` vanishes for a cotangent in the null space.
    """
    m = problem.shape[0]
    size = {key: float(np.linalg.norm(a)) for key, a in base.items()}
    k = problem.columns
    b, x = problem.inputs["b"].reshape(m, k), base["x"].reshape(problem.shape[1], k)
    g = float(np.linalg.norm(d.cotangent))
    out = {"vjp b": g * size["x"] / (float(np.linalg.norm(b)) or 1.0)}
    if "x0" in problem.inputs:
        # Of full rank and undamped, g - A^H T^H g is what a solver's rounding leaves of it.
        lost = cond if problem.full_column_rank and not problem.damping().any() else 1.0
        out["vjp x0"], out["jvp x0"] = g * lost, float(np.linalg.norm(d.tangents["x0"])) * lost
    if "weights" in problem.inputs:
        w = problem.weights()
        inverse = np.divide(1, w, out=np.zeros_like(w), where=w > 0)
        fit = np.abs(b) + np.abs(problem.scattered(np.abs(problem.inputs["A"])) @ np.abs(x))
        az = np.maximum(np.abs(base["vjp b"]).reshape(m, k), out["vjp b"] / max(b.size, 1) ** 0.5)
        out["vjp weights"] = float(np.linalg.norm(az * fit * inverse))
        out["jvp weights"] = size["x"]
    rates = [
        size[f"hvp {k}"] / size[f"vjp {k}"]
        for k in problem.inputs
        if k != "x0" and size[f"vjp {k}"]
    ]
    rate = max([*rates, 0.0])
    for key in problem.inputs:
        if f"vjp {key}" in out:
            out[f"hvp {key}"] = out[f"vjp {key}"] * rate
    if "hvp x0" in out:
        out["hvp x0"] *= lost
    return out
