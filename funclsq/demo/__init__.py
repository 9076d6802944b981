"""The main job on real data: a surface from scattered samples, its weights learnt."""

from funclsq.demo.experiment import Demo, count_ticks, run
from funclsq.demo.findings import table, to_dict
from funclsq.demo.picture import draw_picture, require_plottable

__all__ = [
    "Demo",
    "count_ticks",
    "draw_picture",
    "require_plottable",
    "run",
    "table",
    "to_dict",
]
