"""The figure of docs/replay.md: what a rollout that is trained several times is worth, by three measures."""

# Matplotlib annotates wider types than it takes, and wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from staleness_study.replay_plan import CORE
from staleness_study.results import PROMPTS, SECONDS, Result
from verl_m2po.report.drawing.style import COLOURS, ON_POLICY, RC

NAME = "replay"
CAPTION = (
    "The same runs by prompts generated, and by optimizer updates. Line: mean over seeds; band: lowest to highest seed."
)
LABELS = dict(zip(CORE, ("GRPO, on-policy, one use", "M2PO, four uses", "GRPO, four uses"), strict=True))
COLOUR_OF = dict(zip(CORE, (ON_POLICY, COLOURS["m2po"], COLOURS["grpo"]), strict=True))
TIMED = {
    "on_policy": ("sync", ON_POLICY),
    "bounded_async": ("bounded_async", COLOURS["m2po_clip"]),
    "bounded_async x4": ("bounded_async, replay=x4", COLOURS["m2po"]),
}


def draw(results: Sequence[Result], timed: Sequence[Result]) -> Figure | None:
    """Accuracy against prompts and against updates; against seconds too where timed runs are there. None without runs.

    Args:
        results: Of the stage `replay`.
        timed: Of the timed runs through verl.
    """
    if not results:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(11 if timed else 8.5, 3.6), layout="constrained")
        by_prompts, by_updates, *by_time = figure.subplots(1, 3 if timed else 2)
        _lines(by_prompts, results, lambda run: run.curves[PROMPTS])
        _lines(by_updates, results, lambda run: [step * run.updates_per_step for step in run.steps[1:]])
        by_prompts.set_xlabel("prompts generated")
        by_prompts.set_ylabel("accuracy on held-out problems")
        by_updates.set_xlabel("optimizer updates")
        by_updates.legend(loc="lower right", fontsize=8)
        for axes in (by_prompts, by_updates):
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        for axes in by_time:
            _times(axes, timed)
        return figure


def _lines(axes: Axes, results: Sequence[Result], measure: Callable[[Result], Sequence[float]]) -> None:
    for condition in CORE:
        runs = [run for run in results if (run.loss, run.variant, run.staleness_updates) == condition]
        if not runs:
            continue
        values = np.array([run.accuracy[1:] for run in runs])
        x, colour = measure(runs[0]), COLOUR_OF[condition]
        axes.plot(x, values.mean(0), color=colour, linewidth=2, label=LABELS[condition])
        axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)


def _times(axes: Axes, timed: Sequence[Result]) -> None:
    """Seed by seed."""
    labelled: set[str] = set()
    for run in timed:
        label, colour = TIMED[run.variant]
        seconds = [0.0, *run.curves[SECONDS]]
        axes.plot(seconds, run.accuracy, color=colour, linewidth=1.6, label=None if label in labelled else label)
        labelled.add(label)
    axes.set_xlabel("seconds of trainer steps, through verl")
    axes.set_ylabel("accuracy on held-out problems")
    axes.legend(loc="lower right", fontsize=8)


def save(results: Sequence[Result], timed: Sequence[Result], folder: Path) -> list[str]:
    """Draw the figure as SVG into `folder`; the lines of Markdown that show it, none where there is nothing to draw."""
    figure = draw(results, timed)
    if figure is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        figure.savefig(folder / f"{NAME}.svg", metadata={"Date": None})
    caption = CAPTION + (" Right: the timed runs, a line for each seed." if timed else "")
    return [f"![{CAPTION}](figures/results/{NAME}.svg)", "", f"*{caption}*", ""]
