"""Results against the trainer step, training time and staleness."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from verl_m2po.report.drawing.figures.lines import (
    NothingToDraw,
    Tasks,
    draw_line,
    full_label,
    legend_of,
    new_figure,
    seeds_caption,
    styled,
    whole_numbers,
)
from verl_m2po.report.drawing.style import Look, is_reference, looks, plain
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, Seeds, over_seeds, result_seeds
from verl_m2po.report.reading.summary import training_seconds


def _task_title(task: str, names: dict[str, str]) -> str:
    kinds = sorted({name.rsplit("/", 1)[-1] for name in names.values() if name.startswith("val-core/")})
    return plain(f"{task} ({', '.join(kinds)})" if kinds else task)


def _result_figure(groups: list[Group], tasks: Tasks, of_group: Callable, x_label: str) -> Figure:
    if not tasks:
        raise NothingToDraw("no validation accuracy (val-core/<source>/acc/mean@k) and no critic/score/mean")
    look = looks(groups)
    figure, all_axes = new_figure(7.5, 4.3 * len(tasks) + 0.3, rows=len(tasks))
    for axes, (task, names) in zip(all_axes, tasks.items(), strict=True):
        drawn = [(group, of_group(group, names)) for group in groups]
        drawn = [(group, seeds) for group, seeds in drawn if len(seeds.mean)]
        for group, seeds in drawn:
            draw_line(axes, seeds, look[group.label], group.label, markers=True)
        axes.set_title(_task_title(task, names))
        axes.set_xlabel(f"{x_label}   ({seeds_caption([seeds for _, seeds in drawn])})")
        axes.set_ylabel("accuracy" if "/acc" in task else "result")
    legend_of(figure, *all_axes)
    return figure


@styled
def accuracy(groups: list[Group], tasks: Tasks) -> Figure:
    """Result against the trainer step; one line a group with its seed band, one panel a task."""
    figure = _result_figure(groups, tasks, result_seeds, "trainer step")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(whole_numbers(7))
    return figure


def _result_by_seconds(group: Group, names: dict[str, str]) -> Seeds:
    """`result_seeds` with the mean training seconds of the seeds in the place of the step."""
    seeds = result_seeds(group, names)
    clocks = [training_seconds(run) for run in group.runs if run.name in names]
    clock = over_seeds(clocks).mean.reindex(seeds.mean.index).dropna()
    kept = [_at_seconds(series, clock) for series in (seeds.mean, seeds.low, seeds.high)]
    tail = _at_seconds(seeds.tail, _clock_of_tail(clock, clocks)) if len(seeds.tail) else seeds.tail
    return Seeds(kept[0], kept[1], kept[2], tail, seeds.count)


def _at_seconds(series: pd.Series, clock: pd.Series) -> pd.Series:
    clock = clock.reindex(clock.index.intersection(series.index))
    return series.reindex(clock.index).set_axis(clock.to_numpy())


def _clock_of_tail(clock: pd.Series, clocks: list[pd.Series]) -> pd.Series:
    """Goes on from the end of `clock` by the mean seconds of the seeds that are left, so that time never runs back."""
    if not len(clock):
        return clock
    seconds = pd.concat([one for one in clocks if len(one)], axis=1).sort_index().diff().mean(axis=1)
    later = seconds[seconds.index > clock.index[-1]].cumsum() + clock.iloc[-1]
    return pd.concat([clock.iloc[-1:], later])


@styled
def accuracy_by_time(groups: list[Group], tasks: Tasks) -> Figure:
    """Result against seconds of training, validation not counted; one line a group."""
    if not any(len(training_seconds(run)) for group in groups for run in group.runs):
        raise NothingToDraw(f"no {' or '.join(metrics.STEP_SECONDS)}")
    return _result_figure(groups, tasks, _result_by_seconds, "seconds of training")


def _staleness_axis(axes: Axes, values: list[int]) -> Callable[[int], float]:
    """Label a log2 axis of staleness; 0 stands one octave left of the smallest that is not 0."""
    positive = [value for value in values if value > 0]
    zero = np.log2(min(positive)) - 1 if positive else 0.0
    place = {value: float(np.log2(value)) if value > 0 else float(zero) for value in sorted(set(values))}
    axes.set_xticks(list(place.values()), [str(value) for value in place])
    axes.set_xlabel("staleness (optimizer updates, log2 scale)")
    return lambda value: place[value]


def _result_points(group: Group, names: dict[str, str], of: Callable[[pd.Series], float]) -> np.ndarray:
    return np.array([of(run.series(names[run.name])) for run in group.runs if run.name in names])


def _staleness_line(axes: Axes, groups: list[Group], names: dict[str, str], x_of: Callable, look: Look) -> None:
    """Final (solid) and best (hollow, dashed) result of one loss; bars from the lowest to the highest seed."""
    name = groups[0].loss or groups[0].label
    for of, label, style in (
        (lambda result: result.iloc[-1], f"{name}: final", {"linestyle": "solid", "marker": "o"}),
        (
            lambda result: result.max(),
            f"{name}: best",
            {"linestyle": "dashed", "marker": "o", "markerfacecolor": "white"},
        ),
    ):
        points = [(x_of(g.staleness_updates), _result_points(g, names, of)) for g in groups]
        x = [place for place, _ in points]
        mean = [values.mean() for _, values in points]
        bars = [
            [values.mean() - values.min() for _, values in points],
            [values.max() - values.mean() for _, values in points],
        ]
        axes.errorbar(x, mean, yerr=bars, color=look.colour, capsize=3, linewidth=1.6, label=full_label(label), **style)


@styled
def accuracy_by_staleness(groups: list[Group], tasks: Tasks) -> Figure:
    """Final and best result against staleness in optimizer updates (log2), a line for each loss."""
    known = [group for group in groups if group.staleness_updates is not None]
    if not known or not tasks:
        raise NothingToDraw("no run with a result and a known staleness (config beside the log, or s256 in the name)")
    if len(ages := {group.staleness_updates for group in known}) == 1:
        raise NothingToDraw(f"only one staleness ({ages.pop()} updates)")
    look = looks(groups)
    figure, all_axes = new_figure(7.0, 4.3 * len(tasks) + 0.3, rows=len(tasks))
    for axes, (task, names) in zip(all_axes, tasks.items(), strict=True):
        shown = [group for group in known if any(run.name in names for run in group.runs)]
        x_of = _staleness_axis(axes, [group.staleness_updates or 0 for group in shown])
        for loss in dict.fromkeys(group.loss or group.label for group in shown):
            same = [group for group in shown if (group.loss or group.label) == loss]
            stalest = max(same, key=lambda group: group.staleness_updates or 0)
            _staleness_line(axes, same, names, x_of, look[stalest.label])
        for group in filter(is_reference, shown):
            level = _result_points(group, names, lambda result: result.iloc[-1]).mean()
            axes.axhline(
                level, color=look[group.label].colour, linewidth=1, linestyle="dotted", label="grpo, on-policy: final"
            )
        axes.set_title(_task_title(task, names))
        axes.set_ylabel("accuracy" if "/acc" in task else "result")
    legend_of(figure, *all_axes)
    return figure
