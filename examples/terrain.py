"""Rebuild a mountain range from 5% of its heights, with weights learnt through the solve.

    python terrain.py [--full]

Prints errors, learnt weights and comparisons, and writes terrain.png. The same as the command
``funclsq demo``; the least-squares problem itself is in ``funclsq/demo/terrain.py``, the descent
in ``funclsq/demo/learn.py``.
"""

from __future__ import annotations

import sys

from funclsq.demo import draw_picture, run, table


def main() -> None:
    found = run(quick="--full" not in sys.argv[1:], tick=print)
    draw_picture(found, "terrain.png")
    print(table(found))


if __name__ == "__main__":
    main()
