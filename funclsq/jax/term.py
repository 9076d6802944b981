"""One product with A in a group of several: by A or by its adjoint, as it is or negated."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["ADJOINT", "FORWARD", "Term"]


class Term(NamedTuple):
    """+-A v, or +-A^H u (+-A^T u where nothing is conjugated)."""

    adjoint: bool
    minus: bool = False

    def __neg__(self) -> Term:
        return self._replace(minus=not self.minus)

    def flipped(self) -> Term:
        """The transposed product, of the same sign."""
        return self._replace(adjoint=not self.adjoint)

    def product(self, A: Any, params: Any, aux: Any, t: Any) -> Any:
        """Compute it with a structure of the JAX side."""
        out = (A.rmv if self.adjoint else A.mv)(params, aux, t)
        return -out if self.minus else out


FORWARD, ADJOINT = Term(False), Term(True)
