"""Figures of methods side by side: a row for each, a panel for each question."""

# Matplotlib annotates wider types than it takes, and wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from staleness_study.figures import NAMES, seeds_in_a_row
from verl_m2po.report.drawing.style import COLOURS, ON_POLICY, OTHERS, RC

Finals = Mapping[str, Sequence[float]]
"""By method: final accuracies of its seeds."""


@dataclass(frozen=True)
class Panel:
    """Final accuracies of all methods under one condition.

    Args:
        title: What the condition is.
        published: Of each method with its preset: a dot, with a bar from the lowest to the highest seed.
        chosen: Of each method at another setting: a circle below the dot; empty for none.
        reference: Final accuracies whose mean is a line; empty for none.
        label: Of the axis.
        width: As a multiple of the other panels'.
    """

    title: str
    published: Finals
    chosen: Finals = field(default_factory=dict)
    reference: Sequence[float] = ()
    label: str = "final accuracy"
    width: float = 1.0


def _draw(axes: Axes, panel: Panel, losses: Sequence[str]) -> None:
    for height, loss in enumerate(reversed(losses)):
        colour = COLOURS.get(loss, OTHERS[1])
        chosen = panel.chosen.get(loss, ())
        seeds_in_a_row(axes, height + (0.12 if panel.chosen else 0), panel.published.get(loss, ()), colour, colour)
        seeds_in_a_row(axes, height - 0.18, chosen, colour, "white")
    if panel.reference:
        axes.axvline(float(np.mean(panel.reference)), color=ON_POLICY, linestyle=(0, (4, 1.5)))
    axes.set_xlabel(panel.label)
    axes.set_title(panel.title)


def draw(losses: Sequence[str], panels: Sequence[Panel], one_scale: bool = False) -> Figure | None:
    """A row for each method, the first of `losses` on top; None for no method. With `one_scale` for all panels."""
    if not losses:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.5, 1.4 + 0.27 * len(losses)), layout="constrained")
        widths = [panel.width for panel in panels]
        figure.subplots(1, len(panels), width_ratios=widths, sharey=True, sharex=one_scale)
        for axes, panel in zip(figure.axes, panels, strict=True):
            _draw(axes, panel, losses)
        first = figure.axes[0]
        first.set_yticks(range(len(losses)), [NAMES.get(loss, loss) for loss in reversed(losses)])
        first.set_ylim(-0.7, len(losses) - 0.3)
        return figure


def save(figure: Figure | None, name: str, caption: str, folder: Path) -> list[str]:
    """Write `figure` as SVG into `folder`; the lines of Markdown that show it, none where there is nothing to draw."""
    if figure is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return [f"![{caption}](figures/results/{name}.svg)", "", f"*{caption}*", ""]
