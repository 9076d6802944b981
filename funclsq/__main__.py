"""``python -m funclsq``."""

import sys

from funclsq.cli import main

if __name__ == "__main__":
    sys.exit(main())
