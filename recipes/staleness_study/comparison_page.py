"""The tables of docs/results.md that compare M2PO with its rivals, each as published and at the best of a grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import replace_section

from staleness_study import page as pages
from staleness_study import rival_figures, rivals
from staleness_study.comparison_plan import (
    AGES_STAGE,
    ALTERNATIVES,
    AT_OLDEST,
    HOT_STAGE,
    OLDEST,
    STAGE,
    YOUNGER,
)
from staleness_study.plan import STALEST, STEPS
from staleness_study.results import Result, by_accuracy, select
from staleness_study.rival_figures import Panel
from staleness_study.step_times import StepTimes

SECTION, GRID_SECTION = "comparison", "grid"
CAPTION = (
    f"Final accuracy on data {STALEST} updates old: each method as published (dot) and at the best of its grid "
    "(circle); bars: lowest to highest seed; line: GRPO on-policy. Right: at ten times the learning rate."
)


def _by_accuracy(results: Sequence[Result]) -> list[str]:
    return by_accuracy(results, STAGE, ALTERNATIVES)


def best_methods(results: Sequence[Result]) -> list[str]:
    """The `AT_OLDEST` best on the stalest data, once all have as many seeds there; none before."""
    seeds = {len(select(results, STAGE, loss, STALEST)) for loss in ALTERNATIVES}
    return _by_accuracy(results)[:AT_OLDEST] if len(seeds) == 1 else []


def comparison_table(results: Sequence[Result], times: StepTimes | None = None) -> list[str]:
    """A row for each method, the best on the stalest data first, with the cost of a trainer step where it is known."""
    settings, rows = rivals.best_settings(results), []
    for loss in _by_accuracy(results):
        stalest = select(results, STAGE, loss, STALEST)
        setting = settings.get(loss)
        chosen = rivals.finals(results, STAGE, loss, STALEST, setting) if setting else []
        rows.append(
            [
                pages.name_of(loss),
                str(len(stalest)),
                *(pages.accuracy_of(rivals.finals(results, STAGE, loss, age)) for age in (STALEST, 0)),
                "that of the preset" if setting == "" else pages.accuracy_of(chosen),
                *rivals.cells(results, STAGE, loss),
                _step_time(times, loss),
                pages.collapse(stalest),
            ]
        )
    header = ["", "seeds", f"s={STALEST}", "on-policy", f"s={STALEST}, best of the grid"]
    header += [*rivals.HEADER, "step time", "collapse step"]
    return pages.table(header, rows) if rows else ["Not run yet."]


def oldest_table(results: Sequence[Result]) -> list[str]:
    """A row for each method and setting that learnt from data `OLDEST` updates old, the best first."""
    ran = {(run.loss, run.variant) for run in results if (run.stage, run.staleness_updates) == (STAGE, OLDEST)}
    by_setting = {(loss, variant): select(results, STAGE, loss, OLDEST, variant) for loss, variant in ran}
    rows = []
    for loss, variant in sorted(ran, key=lambda key: (-np.mean([run.final for run in by_setting[key]]), key)):
        runs = by_setting[loss, variant]
        rows.append(
            [
                " ".join([pages.name_of(loss), *rivals.setting(loss, variant)]),
                str(len(runs)),
                pages.accuracy_of([run.final for run in runs]),
                pages.percent([run.mean(run.left_out_name) for run in runs]),
                f"{np.mean([run.mean('second_moment') for run in runs]):.2g}",
            ]
        )
    header = ["", "seeds", "final accuracy", "clipped or masked", "second moment before"]
    return pages.table(header, rows) if rows else ["Not run yet."]


def ages_table(results: Sequence[Result]) -> list[str]:
    """A row for each method with its accuracy on data of every age, after `STEPS` trainer steps."""
    rows = []
    for loss in ALTERNATIVES:
        runs = [select(results, AGES_STAGE, loss, age) for age in sorted(YOUNGER)]
        runs.append([run.until(STEPS) for run in select(results, STAGE, loss, STALEST)])
        if all(runs):
            finals = [pages.accuracy_of([run.final for run in found]) for found in runs]
            rows.append([pages.name_of(loss), "/".join(str(len(found)) for found in runs), *finals])
    names = [f"s={age}" if age else "on-policy" for age in (*sorted(YOUNGER), STALEST)]
    return pages.table(["", "seeds", *names], rows) if rows else ["Not run yet."]


def _step_time(times: StepTimes | None, loss: str) -> str:
    ratio = times.against_base(loss) if times else None
    return "-" if ratio is None else f"{ratio:.2f}"


def panels(results: Sequence[Result]) -> list[Panel]:
    """Of the figure: the stalest data, and ten times the learning rate."""

    def of_stage(stage: str, settings: Mapping[str, str]) -> dict[str, list[float]]:
        return {loss: rivals.finals(results, stage, loss, STALEST, setting) for loss, setting in settings.items()}

    presets = dict.fromkeys(ALTERNATIVES, "")
    chosen = {loss: setting for loss, setting in rivals.best_settings(results).items() if setting}
    hot = {loss: [run.final for run in results if (run.stage, run.loss) == (HOT_STAGE, loss)] for loss in presets}
    return [
        Panel(
            f"Data {STALEST} updates old",
            of_stage(STAGE, presets),
            of_stage(STAGE, chosen),
            rivals.finals(results, STAGE, "grpo", 0),
            width=1.6,
        ),
        Panel("Ten times the learning rate", hot, label="final accuracy, 300 trainer steps"),
    ]


def write(data: dict[str, Any], results: Sequence[Result], page: Path, times: StepTimes | None = None) -> None:
    """Bring the marked sections of `page` up to date.

    Args:
        data: What the runs have in common.
        results: Of all its stages.
        page: docs/results.md.
        times: What a trainer step costs with each method; None where it was not measured.
    """
    replace_section(page, GRID_SECTION, "\n".join(rivals.grid_table(results)))
    about = pages.provenance(data, results, "python -m staleness_study compare")
    hot = ["At ten times the learning rate:", "", *pages.conditions(results, HOT_STAGE)]
    folder = page.parent / "figures" / "results"
    shown = rival_figures.save(rival_figures.draw(_by_accuracy(results), panels(results)), SECTION, CAPTION, folder)
    oldest = [f"On data {OLDEST} updates old:", "", *oldest_table(results)]
    ages = [f"By age, after {STEPS} trainer steps:", "", *ages_table(results)]
    costs = ["", times.provenance] if times else []
    table = [*comparison_table(results, times), *costs]
    replace_section(page, SECTION, "\n".join([*shown, *table, "", *hot, "", *oldest, "", *ages, "", *about]))
