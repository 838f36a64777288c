"""The tables of docs/results.md about long responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import replace_section

from staleness_study import page as pages
from staleness_study import rival_figures, rivals
from staleness_study.long_plan import AGES, GRID_STAGE, OWN, SETTINGS, SETTINGS_HERE, STAGE, TRIAL_STAGE
from staleness_study.plan import STALEST
from staleness_study.results import Result, by_accuracy, select
from staleness_study.rival_figures import Panel

SECTION = "long"
CAPTION = (
    "Final accuracy on long responses by the age of the data: each method as published (dot) and at the setting that "
    "a grid took (circle; on long responses or else on short ones); bars: lowest to highest seed; line: GRPO on-policy."
)


def _by_accuracy(results: Sequence[Result]) -> list[str]:
    return by_accuracy(results, STAGE, sorted({run.loss for run in results if run.stage == STAGE}))


def panels(results: Sequence[Result]) -> list[Panel]:
    """Of the figure: an age each."""
    losses, reference = _by_accuracy(results), rivals.finals(results, STAGE, "grpo", 0)
    settings = SETTINGS | SETTINGS_HERE
    chosen = {loss: rivals.finals(results, STAGE, loss, STALEST, variant) for loss, variant in settings.items()}
    return [
        Panel(
            f"Data {age} updates old" if age else "On-policy",
            {loss: rivals.finals(results, STAGE, loss, age) for loss in losses},
            chosen if age == STALEST else {},
            reference,
        )
        for age in AGES
    ]


def rivals_table(results: Sequence[Result]) -> list[str]:
    """A row for each method, the best on the stalest data first, with what has run of each age."""
    rows = []
    for loss in _by_accuracy(results):
        of_age = [rivals.finals(results, STAGE, loss, age) for age in AGES]
        rows.append(
            [
                pages.name_of(loss),
                "/".join(str(len(finals)) for finals in of_age),
                *(pages.accuracy_of(finals) for finals in of_age),
                *rivals.cells(results, STAGE, loss),
                pages.collapse(select(results, STAGE, loss, STALEST)),
            ]
        )
    ages = [f"s={age}" if age else "on-policy" for age in AGES]
    return pages.table(["", "seeds", *ages, *rivals.HEADER, "collapse step"], rows) if rows else ["Not run yet."]


def _chosen_on() -> dict[tuple[str, str], list[str]]:
    """By method and setting: on responses of which length a grid took it."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for length, settings in (("short", SETTINGS), ("long", SETTINGS_HERE)):
        for taken in settings.items():
            chosen.setdefault(taken, []).append(length)
    return chosen


def settings_table(results: Sequence[Result]) -> list[str]:
    """A row for each setting that a grid took in the place of the preset's, the best first."""
    chosen_on = _chosen_on()
    ran = {taken: runs for taken in chosen_on if (runs := select(results, STAGE, taken[0], STALEST, taken[1]))}
    rows = [
        [
            " ".join([pages.name_of(loss), *rivals.setting(loss, variant)]),
            " and ".join(chosen_on[loss, variant]) + " responses",
            str(len(runs)),
            pages.accuracy_of([run.final for run in runs]),
            pages.points_against(runs, select(results, STAGE, loss, STALEST)),
            pages.percent([run.mean(run.left_out_name) for run in runs]),
            pages.collapse(runs),
        ]
        for (loss, variant), runs in sorted(ran.items(), key=lambda row: -np.mean([run.final for run in row[1]]))
    ]
    header = ["", "chosen on", "seeds", f"s={STALEST}"]
    header += ["points against its preset, same seeds", "clipped or masked", "collapse step"]
    return pages.table(header, rows) if rows else ["Not run yet."]


def write(data: dict[str, Any], results: Sequence[Result], page: Path) -> None:
    """Bring the marked section of `page` up to date.

    Args:
        data: What the runs have in common.
        results: Of all its stages.
        page: docs/results.md.
    """
    figure = rival_figures.draw(_by_accuracy(results), panels(results), one_scale=True)
    lines = [
        *rival_figures.save(figure, SECTION, CAPTION, page.parent / "figures" / "results"),
        "Learning rates that were tried, GRPO on the stalest data:",
        "",
        *pages.conditions(results, TRIAL_STAGE),
        "",
        # Of the others it is in their table.
        *pages.claim([run for run in results if run.loss in OWN], STAGE),
        "",
        *rivals_table(results),
        "",
        "At the settings that a grid took in the place of the preset's:",
        "",
        *settings_table(results),
        "",
        "The grid on long responses, with a seed that is not reported:",
        "",
        *rivals.grid_table(results, GRID_STAGE),
        "",
        *pages.provenance(data, results, "python -m staleness_study long"),
    ]
    replace_section(page, SECTION, "\n".join(lines))
