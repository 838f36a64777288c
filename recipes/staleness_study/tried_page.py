"""The tables of docs/results.md about what was tried to win back what old data costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import replace_section

from staleness_study import page as pages
from staleness_study import tried, tried_plan
from staleness_study.figures import NAMES
from staleness_study.plan import STALEST
from staleness_study.results import Result, select

SECTION = "tried"
HEADER = ("loss", "seeds", "final accuracy", "points against M2PO, same seeds", "masked")


def _shown() -> list[tuple[str, str, int, str]]:
    """(name, loss, staleness in optimizer updates, variant) of each row."""
    around = [
        (f"{NAMES.get(loss, loss)}, {f's={updates}' if updates else 'on-policy'}", loss, updates, "")
        for loss, updates in tried_plan.AROUND
    ]
    return [*around, *((f"`{change}`", "m2po", STALEST, change) for change in tried.names())]


def table(results: Sequence[Result]) -> list[str]:
    """A row for each change to M2PO that has run, with what they are compared with; `results` are of one task."""
    stage = results[0].stage
    unchanged = select(results, stage, "m2po", STALEST)
    rows = []
    for name, loss, updates, variant in _shown():
        runs = select(results, stage, loss, updates, variant)
        if runs:
            finals = [run.final for run in runs]
            masked = [run.mean("masked") for run in runs if loss == "m2po"]
            against = "-" if name == _shown()[0][0] else pages.points_against(runs, unchanged)
            rows.append([name, str(len(runs)), pages.accuracy_of(finals), against, pages.percent(masked)])
    return pages.table(HEADER, rows)


def write(found: Sequence[tuple[dict[str, Any], Sequence[Result]]], page: Path) -> None:
    """Bring the marked section of `page` up to date.

    Args:
        found: For each task, what its runs have in common, and their results.
        page: docs/results.md.
    """
    lines = []
    for data, results in found:
        lines += [*table(results), "", *pages.provenance(data, results, "python -m staleness_study tried"), ""]
    replace_section(page, SECTION, "\n".join(lines[:-1]) if lines else "Not run yet.")
