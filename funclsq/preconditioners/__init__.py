"""Preconditioners: an N near A^H W A + D^2 that is cheap to invert, for the Krylov solvers.

Each function looks at the values of A once and returns a :class:`Preconditioner`, to be given as
``preconditioner=`` to ``lsmr``, ``lsqr`` or ``cgls``. It changes the way to the answer, not the
answer, nor any derivative. The complete factor of a related matrix, ``fl.factorize(A0)``, serves
as well.
"""

from funclsq.preconditioners._block_diagonal import block_diagonal
from funclsq.preconditioners._incomplete import incomplete
from funclsq.preconditioners._preconditioner import Preconditioner
from funclsq.preconditioners._sketch import sketch

__all__ = ["Preconditioner", "block_diagonal", "incomplete", "sketch"]
