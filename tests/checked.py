"""Problems that cross_check is tried on, small enough for every oracle."""

import numpy as np

FAST = ["closed form"]


def data_of(m, n, *, rank=None, k=None, kind=float, weights=None, damp=None, x0=False, zero=False):
    """Random data of one problem, as keyword arguments of cross_check."""
    rng = np.random.default_rng(m * 100 + n)

    def normal(*shape):
        real = rng.standard_normal(shape)
        return real + 1j * rng.standard_normal(shape) if kind is complex else real

    A = normal(m, n) if rank is None else normal(m, rank) @ normal(rank, n)
    out = {"A": A, "b": normal(m) if k is None else normal(m, k)}
    if weights:
        out["weights"] = rng.random((m, k) if weights == "columns" else m) + 0.1
        if zero:
            out["weights"][0] = 0
    if damp is not None:
        out["damp"] = np.asarray(damp)
    if x0:
        out["x0"] = normal(n) if k is None else normal(n, k)
    return out


CASES = {
    "tall": data_of(7, 4),
    "square": data_of(4, 4, weights=True),
    "wide": data_of(3, 5, kind=complex, x0=True),
    "deficient": data_of(6, 5, rank=2, x0=True, weights=True),
    "deficient, weights by column": data_of(6, 4, rank=2, k=2, weights="columns", kind=complex),
    "damped": data_of(6, 4, damp=0.3, weights=True, x0=True, k=2),
    "damped, wide, complex": data_of(3, 5, damp=0.3, weights=True, x0=True, kind=complex),
    "damped by column, once 0": data_of(6, 4, damp=[0.1, 0.0, 0.5, 1.0]),
    "weight 0": data_of(7, 4, weights=True, zero=True, x0=True),
    "weight 0, deficient": data_of(7, 4, rank=2, weights=True, zero=True),
    "one row": data_of(1, 3),
    "one column": data_of(4, 1),
}


def failing(report):
    return {row.quantity for row in report.failures}
