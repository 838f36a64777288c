"""The tables of docs/results.md about long responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import replace_section

from staleness_study import page as pages
from staleness_study.long_plan import STAGE, TRIAL_STAGE
from staleness_study.results import Result

SECTION = "long"


def write(data: dict[str, Any], results: Sequence[Result], page: Path) -> None:
    """Bring the marked section of `page` up to date.

    Args:
        data: What the runs have in common.
        results: Of both stages, the trials of the learning rate and what came of them.
        page: docs/results.md.
    """
    lines = [
        "Learning rates that were tried, GRPO on the stalest data:",
        "",
        *pages.conditions(results, TRIAL_STAGE),
        "",
        *pages.claim(results, STAGE),
        "",
        *pages.conditions(results, STAGE),
        "",
        *pages.provenance(data, results, "python -m staleness_study long"),
    ]
    replace_section(page, SECTION, "\n".join(lines))
