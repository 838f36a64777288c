"""The figures. Each function takes groups and returns a matplotlib Figure; nothing is shown or saved here.

A function raises `NothingToDraw` when no group logged what it shows; it draws what is there otherwise.
"""

from verl_m2po.report.drawing.figures.ages import MOST_HEAT_MAPS, age_of_data, age_shares, with_ages
from verl_m2po.report.drawing.figures.lines import NothingToDraw
from verl_m2po.report.drawing.figures.results import accuracy, accuracy_by_staleness, accuracy_by_time
from verl_m2po.report.drawing.figures.speed import phase_seconds, throughput, time_per_step
from verl_m2po.report.drawing.figures.strips import buffer, health
from verl_m2po.report.drawing.figures.trust_region import left_out_fraction, second_moment

__all__ = [
    "MOST_HEAT_MAPS",
    "NothingToDraw",
    "accuracy",
    "accuracy_by_staleness",
    "accuracy_by_time",
    "age_of_data",
    "age_shares",
    "buffer",
    "health",
    "left_out_fraction",
    "phase_seconds",
    "second_moment",
    "throughput",
    "time_per_step",
    "with_ages",
]
