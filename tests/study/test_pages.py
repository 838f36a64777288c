"""The committed pages say what the committed results say."""

import shutil
from pathlib import Path

from staleness_study.__main__ import write_pages

DOCS = Path(__file__).parents[2] / "docs"
PAGES = ("results.md", "replay.md")


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path):
    shutil.copytree(DOCS / "results", tmp_path / "results")
    for page in PAGES:
        shutil.copy(DOCS / page, tmp_path)
    write_pages(tmp_path)
    for page in PAGES:
        assert (tmp_path / page).read_text() == (DOCS / page).read_text(), f"`make study-results` changes {page}"
    drawn = {figure.name for figure in (tmp_path / "figures" / "results").iterdir()}
    linked = "".join((DOCS / page).read_text() for page in PAGES)
    assert drawn, "no figure was drawn"
    for name in drawn:
        assert f"figures/results/{name}" in linked, f"no page shows {name}"
