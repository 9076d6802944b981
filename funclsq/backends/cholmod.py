"""CHOLMOD through scikit-sparse (0.4 or 0.5), where SuiteSparse is installed."""

from __future__ import annotations

import threading

import numpy as np
import scipy.sparse
from sksparse import cholmod as _cholmod

from funclsq.backends.registry import NotPositive

__all__ = ["DTYPES", "NAME", "analyze"]

NAME = "cholmod"
DTYPES = frozenset({"float64", "complex128"})
