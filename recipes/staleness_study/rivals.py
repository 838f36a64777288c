"""What the tables of methods on the stalest data have in common, whichever the task."""

from collections.abc import Sequence

import numpy as np

from staleness_study import page as pages
from staleness_study.comparison_plan import ALTERNATIVES, GRID
from staleness_study.plan import STALEST
from staleness_study.results import Result, select

# Of `cells`
HEADER = (f"of GRPO's gap recovered at s={STALEST}", "clipped or masked", "effective sample size")


def finals(results: Sequence[Result], stage: str, loss: str, age: int, variant: str = "") -> list[float]:
    """Final accuracies of a method's seeds, on data `age` updates old."""
    return [run.final for run in select(results, stage, loss, age, variant)]


def setting(loss: str, variant: str) -> list[str]:
    """What a key of `ALTERNATIVES` sets, such as ``threshold=0.16``; nothing for that of the preset."""
    overrides = ALTERNATIVES[loss][variant] if variant else ()
    keys = [override.partition("=") for override in overrides]
    return [f"`{key.rpartition('.')[2]}={value}`" for key, _, value in keys]


def best_settings(results: Sequence[Result], stage: str = GRID) -> dict[str, str]:
    """By method whose grid is whole: its setting with the highest final accuracy; empty for that of the preset."""
    chosen = {}
    for loss, alternatives in ALTERNATIVES.items():
        found = {variant: select(results, stage, loss, STALEST, variant) for variant in ("", *alternatives)}
        if all(found.values()):
            chosen[loss] = max(found, key=lambda variant: found[variant][0].final)
    return chosen


def grid_table(results: Sequence[Result], stage: str = GRID) -> list[str]:
    """A row for each setting that was tried, and which one is taken."""
    chosen, rows = best_settings(results, stage), []
    for loss, alternatives in ALTERNATIVES.items():
        for variant in ("", *alternatives):
            for run in select(results, stage, loss, STALEST, variant):
                left_out = [run.mean(run.left_out_name)] if run.left_out_name in run.curves else []
                values = " ".join(setting(loss, variant)) or "preset"
                mark = "taken" if chosen.get(loss) == variant else ""
                rows.append([pages.name_of(loss), values, f"{run.final:.3f}", pages.percent(left_out), mark])
    return pages.table(["", "setting", "final accuracy", "clipped or masked", ""], rows) if rows else ["Not run yet."]


def cells(results: Sequence[Result], stage: str, loss: str) -> list[str]:
    """Of a method on the stalest data: `HEADER`."""
    runs = select(results, stage, loss, STALEST)
    grpo, reference = (finals(results, stage, "grpo", age) for age in (STALEST, 0))
    effective = np.mean([run.mean("effective") for run in runs])
    left_out = [run.mean(run.left_out_name) for run in runs if run.left_out_name in run.curves]
    return [
        pages.recovered([run.final for run in runs], grpo, reference) or "-",
        pages.percent(left_out),
        # Of runs that have not got beyond the ramp there is none.
        "-" if np.isnan(effective) else f"{effective:.3f}",
    ]
