"""The figure of the comparison: every method on the stalest data, as published and at the best of its grid."""

# Matplotlib annotates wider types than it takes, and wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from staleness_study.comparison_plan import HOT_STAGE, STAGE
from staleness_study.figures import NAMES, seeds_in_a_row
from staleness_study.plan import STALEST
from staleness_study.results import Result
from staleness_study.rivals import finals
from verl_m2po.report.drawing.style import COLOURS, ON_POLICY, OTHERS, RC

NAME = "comparison"
CAPTION = (
    f"Final accuracy on data {STALEST} updates old: each method as published (dot) and at the best of its grid "
    "(circle); bars: lowest to highest seed; line: GRPO on-policy. Right: at ten times the learning rate."
)


def draw(results: Sequence[Result], losses: Sequence[str], settings: Mapping[str, str]) -> Figure | None:
    """A row for each method, the first of `losses` on top; None for no method.

    Args:
        results: Of the stages of the comparison.
        losses: Options of the Hydra group ``loss`` that have run, the best first.
        settings: By method: what the grid found best, empty for the preset's.
    """
    if not losses:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.5, 1.4 + 0.27 * len(losses)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.6, 1), sharey=True)
        for height, loss in enumerate(reversed(losses)):
            colour = COLOURS.get(loss, OTHERS[1])
            seeds_in_a_row(left, height + 0.12, finals(results, STAGE, loss, STALEST), colour, colour)
            if setting := settings.get(loss):
                seeds_in_a_row(left, height - 0.18, finals(results, STAGE, loss, STALEST, setting), colour, "white")
            hot = [run.final for run in results if run.stage == HOT_STAGE and run.loss == loss]
            seeds_in_a_row(right, height, hot, colour, colour)
        if reference := finals(results, STAGE, "grpo", 0):
            left.axvline(float(np.mean(reference)), color=ON_POLICY, linestyle=(0, (4, 1.5)))
        left.set_yticks(range(len(losses)), [NAMES.get(loss, loss) for loss in reversed(losses)])
        left.set_ylim(-0.7, len(losses) - 0.3)
        left.set_xlabel("final accuracy")
        left.set_title(f"Data {STALEST} updates old")
        right.set_xlabel("final accuracy, 300 trainer steps")
        right.set_title("Ten times the learning rate")
        return figure


def save(results: Sequence[Result], losses: Sequence[str], settings: Mapping[str, str], folder: Path) -> list[str]:
    """Draw the figure as SVG into `folder`; the lines of Markdown that show it, none where there is nothing to draw."""
    figure = draw(results, losses, settings)
    if figure is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(RC):
        figure.savefig(folder / f"{NAME}.svg", metadata={"Date": None})
    return [f"![{CAPTION}](figures/results/{NAME}.svg)", "", f"*{CAPTION}*", ""]
