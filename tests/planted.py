"""Golub and Pereyra's rule as plain matrix algebra in NumPy, with errors planted on request.

For M = [W^(1/2) A; D], c = [W^(1/2)(b - A x0); 0], P = M^+, y = P c, s = c - M y and a cotangent g:

    M_bar = s z^H - u y^H + v n^H,    u = P^H g, z = P u, v = P^H y, n = g - M^H u
    y'    = P (c' - M' y) + P P^H M'^H s + (I - P M) M'^H v

Every named term can be dropped, flipped, scaled by 1.01, conjugated or transposed: the mistakes
that a derivative rule is likely to have.
"""

import numpy as np

CHANGES = {
    "dropped": lambda a: 0 * a,
    "flipped": lambda a: -a,
    "scaled": lambda a: 1.01 * a,
    "conjugated": lambda a: a.conj(),
    "transposed": lambda a: a.T,
}
# Where a change of each term must show: these rows fail, and no others.
OUTER = {"s z^H": {"vjp A"}, "u y^H": {"vjp A"}, "v n^H": {"vjp A"}}
VECTORS = {"b_bar": {"vjp b"}, "x0_bar": {"vjp x0"}}
REALS = {"weights_bar": {"vjp weights"}, "damp_bar": {"vjp damp"}}
TANGENTS = {
    "P (c' - M' y)": {"jvp A", "jvp b", "jvp x0", "jvp weights", "jvp damp"},
    "P P^H M'^H s": {"jvp A", "jvp weights", "jvp damp"},
    "(I - P M) M'^H v": {"jvp A"},
}


def planted(term=None, change=None):
    """Return a candidate for cross_check whose rule has this term changed; none, if not given."""

    def maybe(name, value):
        return CHANGES[change](value) if name == term else value

    def answers(problem, d):
        (m, n), inputs = problem.shape, problem.inputs
        A, b, g = problem.toarray(), inputs["b"], d.cotangent
        w, damp = problem.weights()[:, 0], problem.damping()
        x0 = inputs.get("x0", np.zeros(n))
        root = np.sqrt(w)
        M = np.vstack([root[:, None] * A, np.diag(damp)])
        c = np.concatenate([root * (b - A @ x0), np.zeros(n)])
        U, sigma, Vh = np.linalg.svd(M, full_matrices=False)
        r = problem.rank
        P = (Vh[:r].conj().T / sigma[:r]) @ U[:, :r].conj().T
        y = P @ c
        s, u, v = c - M @ y, P.conj().T @ g, P.conj().T @ y
        z, k = P @ u, g - M.conj().T @ u
        M_bar = np.outer(s, z.conj()) - np.outer(u, y.conj()) + np.outer(v, k.conj())
        parts = {
            "s z^H": root[:, None] * np.outer(s[:m], z.conj()),
            "u y^H": -root[:, None] * np.outer(u[:m], (y + x0).conj()),
            "v n^H": root[:, None] * np.outer(v[:m], k.conj()),
        }
        A_bar = sum(maybe(name, part) for name, part in parts.items())
        along = (M_bar[:m].conj() * A).sum(1).real + (u[:m].conj() * (b - A @ x0)).real
        out = {
            "x": x0 + y,
            "vjp A": A_bar[problem.row, problem.col],
            "vjp b": maybe("b_bar", root * u[:m]),
            "vjp x0": maybe("x0_bar", g - A.conj().T @ (root * u[:m])),
            "vjp weights": maybe("weights_bar", along / (2 * root)),
            "vjp damp": maybe("damp_bar", np.diag(M_bar[m:]).real),
        }
        if inputs.get("damp", np.zeros(1)).ndim == 0:
            out["vjp damp"] = out["vjp damp"].sum()
        for key, dot in d.tangents.items():
            M_dot, c_dot, x0_dot = np.zeros_like(M), np.zeros_like(c), np.zeros(n)
            if key == "A":
                A_dot = np.zeros_like(A)
                np.add.at(A_dot, (problem.row, problem.col), dot)
                M_dot[:m], c_dot[:m] = root[:, None] * A_dot, -root * (A_dot @ x0)
            elif key == "b":
                c_dot[:m] = root * dot
            elif key == "x0":
                x0_dot, c_dot[:m] = dot, -root * (A @ dot)
            elif key == "weights":
                M_dot[:m] = (dot / (2 * root))[:, None] * A
                c_dot[:m] = dot / (2 * root) * (b - A @ x0)
            else:
                M_dot[m:] = np.diag(np.broadcast_to(dot, (n,)))
            fall = M_dot.conj().T @ v
            out[f"jvp {key}"] = (
                x0_dot
                + maybe("P (c' - M' y)", P @ (c_dot - M_dot @ y))
                + maybe("P P^H M'^H s", P @ (P.conj().T @ (M_dot.conj().T @ s)))
                + maybe("(I - P M) M'^H v", fall - P @ (M @ fall))
            )
        return {name: a for name, a in out.items() if name.partition(" ")[2] in ("", *inputs)}

    return answers
