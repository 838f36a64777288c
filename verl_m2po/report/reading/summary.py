"""The numbers of the table: one `Summary` for each group and task."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false

from dataclasses import dataclass

import numpy as np
import pandas as pd

from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group
from verl_m2po.report.reading.runs import Run

COLLAPSE_POINTS = 3


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; deviation NaN for a single seed."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread | None":
        """None where no seed has a value."""
        finite = [value for value in values if np.isfinite(value)]
        if not finite:
            return None
        deviation = float(np.std(finite, ddof=1)) if len(finite) > 1 else float("nan")
        return cls(float(np.mean(finite)), deviation, len(finite))


@dataclass(frozen=True)
class Summary:
    """One row of the table; None where nothing was logged or nothing happened.

    Args:
        label: The group's.
        task: The task's, or the metric's, name.
        seeds: Runs that logged this task.
        steps: Trainer steps of the longest run.
        start, final, best: Result metric: first value, mean of the last `final_points`, largest.
        best_step: Trainer step of the best value, mean over seeds.
        reached: Seeds that reached the target.
        steps_to_target, seconds_to_target: Over the seeds that reached it; seconds of training, validation not counted.
        collapsed: Seeds that collapsed (`collapse_step`).
        collapse_step: Trainer step, over the seeds that collapsed.
        left_out: Mean share of tokens that were clipped or masked.
        tokens_per_second: verl's throughput per device: median over steps, mean over seeds.
    """

    label: str
    task: str
    seeds: int
    steps: int
    start: Spread | None
    final: Spread | None
    best: Spread | None
    best_step: Spread | None
    reached: int
    steps_to_target: Spread | None
    seconds_to_target: Spread | None
    collapsed: int
    collapse_step: Spread | None
    left_out: Spread | None
    tokens_per_second: Spread | None


def collapse_step(result: pd.Series) -> int | None:
    """The trainer step at which a run collapsed, or None.

    A run collapsed at the first of its last points, at least `COLLAPSE_POINTS` of them, that all lie more than half of
    the way down from the best value so far to the floor. The floor is 0, or the lowest value where that is negative. A
    run that recovers has not collapsed, and neither has one that never rose above the floor.

    Args:
        result: Finite values by trainer step, as logged, not smoothed.
    """
    if len(result) <= COLLAPSE_POINTS:
        return None
    values = result.to_numpy()
    floor = min(0.0, values.min())
    best_so_far = np.maximum.accumulate(values)
    # The first value is its own best and never below, so that argmin finds the last one that is not.
    below = values < floor + 0.5 * (best_so_far - floor)
    trailing = int(np.argmin(below[::-1]))
    return int(result.index[-trailing]) if trailing >= COLLAPSE_POINTS else None


def training_seconds(run: Run) -> pd.Series:
    """Seconds of training since the run's first logged step, by step; validation is not counted, nor lost attempts."""
    name = metrics.first_logged(run.logged, metrics.STEP_SECONDS)
    if name is None:
        return pd.Series(dtype=float)
    return run.frame[name].fillna(0.0).cumsum()


def first_reaching(result: pd.Series, target: float) -> int | None:
    """The first trainer step at which the result is at least `target`, or None."""
    reached = result.index[result >= target]
    return int(reached[0]) if len(reached) else None


def left_out_metric(group: Group, run: Run) -> str | None:
    """The share of tokens without gradient: masked by M2PO's trust region, clipped by any other loss.

    Statistics of the trust region may be logged for every loss; for one that is known not to mask, the clip counts. A
    loss that logs only one of the two is shown by that one.
    """
    masks = group.loss is None or group.loss.startswith("m2po")
    names = (metrics.MASKED_FRACTION, metrics.CLIP_FRACTION)
    return metrics.first_logged(run.logged, names if masks else names[::-1])


def _left_out(group: Group) -> Spread | None:
    names = [(run, left_out_metric(group, run)) for run in group.runs]
    return Spread.of([float(run.series(name).mean()) for run, name in names if name])


def _tokens_per_second(runs: list[Run]) -> Spread | None:
    return Spread.of([float(run.series(metrics.THROUGHPUT).median()) for run in runs])


def summarise(
    group: Group, task_name: str, task: dict[str, str], target: float | None, final_points: int = 1
) -> Summary | None:
    """One row of the table; None if no run of the group logged the task.

    Args:
        group: The group.
        task_name: What the table calls the task.
        task: Run name to metric, as from `tasks_of`.
        target: Result to reach; None for no target.
        final_points: How many of the last points make the final value (their mean).
    """
    runs = [run for run in group.runs if run.name in task]
    if not runs:
        return None
    results = [run.series(task[run.name]) for run in runs]
    reaching = (
        [(run, first_reaching(result, target)) for run, result in zip(runs, results, strict=True)]
        if target is not None
        else []
    )
    reached = [(run, step) for run, step in reaching if step is not None]
    timed = [(training_seconds(run), step) for run, step in reached]
    collapsed = [step for step in map(collapse_step, results) if step is not None]
    return Summary(
        label=group.label,
        task=task_name,
        seeds=len(runs),
        steps=max(int(run.frame.index[-1]) for run in runs),
        start=Spread.of([result.iloc[0] for result in results]),
        final=Spread.of([result.iloc[-final_points:].mean() for result in results]),
        best=Spread.of([result.max() for result in results]),
        best_step=Spread.of([float(result.idxmax()) for result in results]),
        reached=len(reached),
        steps_to_target=Spread.of([float(step) for _, step in reached]),
        seconds_to_target=Spread.of([float(seconds.loc[step]) for seconds, step in timed if len(seconds)]),
        collapsed=len(collapsed),
        collapse_step=Spread.of([float(step) for step in collapsed]),
        left_out=_left_out(group),
        tokens_per_second=_tokens_per_second(runs),
    )
