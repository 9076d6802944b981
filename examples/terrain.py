"""Rebuild a mountain range from 5% of its heights, with weights learnt through the solve.

    python terrain.py [--full] [-o PICTURE]

A crop of the map, or all of it: prints errors, learnt weights and comparisons, and draws them. The
same as the command ``funclsq demo``; the least-squares problem itself is in
``funclsq/demo/terrain.py``, the descent in ``funclsq/demo/learn.py``.
"""

from __future__ import annotations

import argparse

from funclsq.demo import draw_picture, run, table


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("-o", "--output", default="terrain.png")
    options = parser.parse_args()
    found = run(quick=not options.full, tick=print)
    draw_picture(found, options.output)
    print(table(found))


if __name__ == "__main__":
    main()
