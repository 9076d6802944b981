"""The command line: ``funclsq solve``, ``funclsq check``, ``funclsq demo``."""

from funclsq.cli.entry import main

__all__ = ["main"]
