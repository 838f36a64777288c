"""What the tables of methods on the stalest data have in common, whichever the task."""

from collections.abc import Sequence

import numpy as np

from staleness_study import page as pages
from staleness_study.comparison_plan import ALTERNATIVES
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
