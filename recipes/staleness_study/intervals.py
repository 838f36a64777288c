"""Means over seeds with their intervals, and what is made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from staleness_study.results import Result

# For an interval that says anything
LEAST_SEEDS = 3


def student_t(freedom: int) -> float:
    """97.5% quantile of Student's t with that many degrees of freedom."""
    return float(stats.t.ppf(0.975, freedom))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half width of its 95% interval (Student's t); NaN for a single seed."""

    mean: float
    half_width: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        """None for no seed."""
        if not values:
            return None
        count = len(values)
        if count == 1:
            return cls(float(values[0]), float("nan"), 1)
        t = student_t(count - 1)
        return cls(float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(count)), count)


def recovered_gap(
    method: Sequence[float], grpo: Sequence[float], reference: Sequence[float]
) -> tuple[float, float, float] | None:
    """Share of GRPO's gap to on-policy training that `method` recovers, with a 95% interval over seeds.

    The interval is that of a ratio of differences of means (delta method) with Student's t and Welch's degrees of
    freedom; three to five seeds are too few for a bootstrap, whose intervals come out too narrow.

    Args:
        method: Final accuracies of the method on stale data.
        grpo: Of GRPO on the same.
        reference: Of on-policy training.

    Returns:
        Share, lower and upper end; None where one of them has fewer than `LEAST_SEEDS` seeds or GRPO has no gap.
    """
    gap = float(np.mean(reference) - np.mean(grpo)) if len(reference) and len(grpo) else 0.0
    if min(len(method), len(grpo), len(reference)) < LEAST_SEEDS or gap <= 0:
        return None
    share = float(np.mean(method) - np.mean(grpo)) / gap
    # Derivative of the share by each of the three means, times the gap
    parts = [
        (factor**2 * float(np.var(values, ddof=1)) / len(values), len(values) - 1)
        for factor, values in ((1.0, method), (1 - share, grpo), (share, reference))
    ]
    variance = sum(part for part, _ in parts)
    # Rounded down, which errs on the wide side
    freedom = int(variance**2 / sum(part**2 / degrees for part, degrees in parts)) if variance else 1
    half_width = student_t(freedom) * float(np.sqrt(variance)) / gap
    return share, share - half_width, share + half_width


def difference(method: Sequence[Result], other: Sequence[Result]) -> Interval | None:
    """By how much the final accuracy of `method` is above that of `other` on the same seeds; None for no such seed."""
    of_other = {run.seed: run.final for run in other}
    return Interval.of([run.final - of_other[run.seed] for run in method if run.seed in of_other])
