"""Where the time of a trainer step goes, and how many tokens come of it."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import numpy as np
from matplotlib.figure import Figure

from verl_m2po.report.drawing.figures.lines import (
    NothingToDraw,
    Tasks,
    draw_line,
    integer_steps,
    legend_of,
    new_figure,
    smoothed,
    styled,
)
from verl_m2po.report.drawing.style import PHASE_COLOURS, looks, plain
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, seeds_of


def phase_seconds(group: Group) -> dict[str, float] | None:
    """Mean seconds per trainer step of each phase, over steps and seeds; None where steps were not timed.

    "other" is what the phases leave of the step. Validation ("testing") comes on top of the step, as verl times it.
    """
    totals: dict[str, list[float]] = {}
    for run in group.runs:
        name = metrics.first_logged(run.logged, metrics.STEP_SECONDS)
        if name is None:
            continue
        step = run.series(name)
        phases = {phase: run.frame[f"timing_s/{phase}"].sum() / len(step) for phase in _timed(run.logged)}
        inside = sum(seconds for phase, seconds in phases.items() if phase not in metrics.OUTSIDE_STEP)
        phases["other"] = max(0.0, float(step.mean()) - inside)
        for phase, seconds in phases.items():
            totals.setdefault(phase, []).append(float(seconds))
    return {phase: float(np.mean(values)) for phase, values in totals.items()} or None


def _timed(logged: set[str]) -> list[str]:
    return [phase for phase in (*metrics.PHASES, *metrics.OUTSIDE_STEP) if f"timing_s/{phase}" in logged]


@styled
def time_per_step(groups: list[Group], tasks: Tasks) -> Figure:
    """Mean seconds of a trainer step, stacked by phase, a bar for each group."""
    timed = [(group, seconds) for group in groups if (seconds := phase_seconds(group)) is not None]
    if not timed:
        raise NothingToDraw(f"no {' or '.join(metrics.STEP_SECONDS)}")
    figure, (axes,) = new_figure(7.5, 1.6 + 0.45 * len(timed) + 0.5)
    places = np.arange(len(timed))
    left = np.zeros(len(timed))
    for phase in (*metrics.PHASES, "other", *metrics.OUTSIDE_STEP):
        width = np.array([seconds.get(phase, 0.0) for _, seconds in timed])
        if width.any():
            hatch = "///" if phase in metrics.OUTSIDE_STEP else None
            label = f"{phase} (validation, after the step)" if hatch else phase
            axes.barh(
                places, width, 0.65, left=left, color=PHASE_COLOURS[phase], hatch=hatch, edgecolor="white", label=label
            )
        left += width
    axes.set_yticks(places, [plain(group.label, 40) for group, _ in timed])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds per trainer step (mean)")
    axes.set_title("Where a step's time goes")
    legend_of(figure, axes)
    return figure


@styled
def throughput(groups: list[Group], tasks: Tasks) -> Figure:
    """Tokens per second and device against the step."""
    look = looks(groups)
    figure, (axes,) = new_figure(7.5, 4.2)
    for group in groups:
        seeds = seeds_of(group, (metrics.THROUGHPUT,))
        if len(seeds.mean):
            draw_line(axes, smoothed(seeds), look[group.label], group.label)
    if not axes.lines:
        raise NothingToDraw(f"no {metrics.THROUGHPUT}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second and device")
    axes.set_title("Throughput (prompt and response tokens)")
    integer_steps(axes)
    legend_of(figure, axes)
    return figure
