"""The tables of docs/results.md about what was tried to win back what old data costs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pages import replace_section

from staleness_study import page as pages
from staleness_study import tried, tried_plan
from staleness_study.plan import STALEST
from staleness_study.results import Result, select

SECTION = "tried"
HEADER = ("loss", "seeds", "final accuracy", "points against M2PO, same seeds", "masked")


Row = tuple[str, str, int, str]
"""(name, loss, staleness in optimizer updates, variant)."""


def _changes(variant_of: Callable[[str], str]) -> list[Row]:
    return [(f"`{change}`", "m2po", STALEST, variant_of(change)) for change in tried.names()]


def _shown() -> list[Row]:
    """What ran as long as the claim, M2PO first."""
    around = [
        (f"{pages.name_of(loss)}, {f's={updates}' if updates else 'on-policy'}", loss, updates, "")
        for loss, updates in tried_plan.AROUND
    ]
    return [*around, *_changes(str)]


def _shown_hot() -> list[Row]:
    """What ran at ten times the learning rate, M2PO first."""
    unchanged = tried_plan.hot_variant("")
    around = [(f"{pages.name_of(loss)}, s={STALEST}", loss, STALEST, unchanged) for loss in tried_plan.HOT_AROUND]
    return [*around, *_changes(tried_plan.hot_variant)]


def table(results: Sequence[Result], stage: str, rows: Sequence[Row]) -> list[str]:
    """A line for each of `rows` that has run in `stage`, compared with the first; `results` are of one task."""
    first, lines = select(results, stage, *rows[0][1:]), []
    for row in rows:
        runs = select(results, stage, *row[1:])
        if runs:
            finals = [run.final for run in runs]
            masked = [run.mean("masked") for run in runs if run.loss.startswith("m2po")]
            against = "-" if row is rows[0] else pages.points_against(runs, first)
            lines.append([row[0], str(len(runs)), pages.accuracy_of(finals), against, pages.percent(masked)])
    return pages.table(HEADER, lines) if lines else []


def write(found: Sequence[tuple[dict[str, Any], Sequence[Result]]], page: Path) -> None:
    """Bring the marked section of `page` up to date.

    Args:
        found: For each task, what its runs have in common, and their results.
        page: docs/results.md.
    """
    lines = []
    for data, results in found:
        stage, steps = tried_plan.TASKS[data["config"]]
        for title, of_stage, rows in (
            (f"`{data['config']}`, {steps} trainer steps:", stage, _shown()),
            ("At ten times the learning rate:", tried_plan.HOT_STAGE, _shown_hot()),
        ):
            if shown := table(results, of_stage, rows):
                lines += [title, "", *shown, ""]
        lines += [*pages.provenance(data, results, "python -m staleness_study tried"), ""]
    replace_section(page, SECTION, "\n".join(lines[:-1]) if lines else "Not run yet.")
