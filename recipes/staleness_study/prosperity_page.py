"""What docs/results.md shows of prosperity before collapse: a figure and its table."""

# Matplotlib annotates wider types than it takes, and wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages import replace_section

from staleness_study import page as pages
from staleness_study.figures import NAMES, band, label_ends
from staleness_study.long_plan import BETTER
from staleness_study.plan import STALEST
from staleness_study.prosperity_plan import (
    CONDITIONS,
    LATER_CONDITIONS,
    LATER_RATE,
    LATER_STAGE,
    LATER_STEPS,
    LATER_TRIAL_STAGE,
    RATE,
    STAGE,
    TRIAL_STAGE,
    VARIANT,
    later,
)
from staleness_study.results import Result, select
from verl_m2po.report.drawing.style import COLOURS, ON_POLICY, OTHERS, RC

SECTION = NAME = "prosperity"
LATER_NAME = LATER_STAGE
CAPTION = (
    f"Training without a trust region collapses: column addition, data {STALEST} updates old, learning "
    f"rate {RATE:g}. Line: mean over seeds; band: lowest to highest seed."
)
LATER_CAPTION = (
    f"The same at a learning rate of {LATER_RATE:g}, over {LATER_STEPS} trainer steps. Line: mean over seeds; band: "
    "lowest to highest seed."
)
# The smallest second moment that is drawn
FLOOR = 5e-4
BETTER_COLOURS = {loss: colour for (loss, _), colour in zip(BETTER, (OTHERS[0], OTHERS[3]), strict=True)}


def draw(
    results: Sequence[Result],
    stage: str = STAGE,
    conditions: Sequence[tuple[str, int]] = CONDITIONS,
    variant: str = VARIANT,
) -> Figure | None:
    """Accuracy and second moment by trainer step, a line for each condition; None before any has run."""
    runs = {condition: select(results, stage, *condition, variant) for condition in conditions}
    runs = {condition: found for condition, found in runs.items() if found}
    if not runs:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _lines(left, runs, None)
        left.set_ylabel("accuracy on held-out problems")
        left.set_title(f"Accuracy on data {STALEST} updates old")
        _lines(right, runs, "second_moment")
        right.set_yscale("log")
        right.set_ylim(bottom=FLOOR)
        right.set_ylabel("mean of (log r)²")
        right.set_title("Second moment before any mask")
        return figure


def _lines(axes: Axes, runs: dict[tuple[str, int], list[Result]], curve: str | None) -> None:
    ends, colours = {}, {}
    for (loss, updates), found in runs.items():
        name = NAMES.get(loss, loss) if updates else "on-policy (GRPO, s=0)"
        colours[name] = (COLOURS | BETTER_COLOURS)[loss] if updates else ON_POLICY
        style = {} if updates else {"linestyle": (0, (4, 1.5)), "zorder": 3}
        ends[name] = band(axes, found, colours[name], curve, **style)
    first = next(found[0] for found in runs.values())
    axes.set_xlim(0, first.steps[-1])
    axes.axvspan(0, STALEST / first.updates_per_step, color="#F4F4F4", zorder=0)
    axes.set_xlabel(f"trainer step ({first.updates_per_step} optimizer updates)")
    if curve is None:
        low, high = axes.get_ylim()
        label_ends(axes, first.steps[-1], ends, colours, 0.052 * (high - low))


def write(data: dict[str, Any], results: Sequence[Result], page: Path) -> None:
    """Bring the marked section of `page`, and the figure beside it, up to date.

    Args:
        data: What the runs have in common.
        results: Of both stages, the trials of the learning rate and what came of them.
        page: docs/results.md.
    """
    lines = [
        *_shown(draw(results), NAME, CAPTION, page),
        *pages.conditions(results, STAGE),
        "",
        "Learning rates at which it was looked for, with another seed:",
        "",
        *pages.conditions(results, TRIAL_STAGE),
        "",
        *_later(results, page),
        *pages.provenance(data, results, "python -m staleness_study prosperity"),
    ]
    replace_section(page, SECTION, "\n".join(lines))


def _later(results: Sequence[Result], page: Path) -> list[str]:
    """The smaller rate, over more steps; nothing before any of it has run."""
    variant = later(LATER_STAGE, *LATER_CONDITIONS[0], 0).variant
    figure = draw(results, LATER_STAGE, LATER_CONDITIONS, variant)
    if figure is None:
        return []
    return [
        *_shown(figure, LATER_NAME, LATER_CAPTION, page),
        *pages.conditions(results, LATER_STAGE),
        "",
        "Where this was looked for, with another seed:",
        "",
        *pages.conditions(results, LATER_TRIAL_STAGE),
        "",
    ]


def _shown(figure: Figure | None, name: str, caption: str, page: Path) -> list[str]:
    """The lines of `page` that show `figure`, which is written beside it; none without one."""
    if figure is None:
        return []
    folder = page.parent / "figures" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return [f"![{caption}](figures/results/{name}.svg)", "", f"*{caption}*", ""]
