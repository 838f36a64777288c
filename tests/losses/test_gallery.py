"""The drawings say what the registered functions do."""

import json
import re
from pathlib import Path

import generate_gallery as gallery
import pytest
import torch
from torch.testing import assert_close

RATIOS = torch.tensor(gallery.RATIOS, dtype=torch.float64)
REPOSITORY = Path(__file__).parents[2]
TABLE = REPOSITORY / "docs" / "figures" / "methods" / "table.md"


@pytest.mark.parametrize(
    ("name", "positive", "negative"),
    [
        ("no_trust_region", [0.2, 0.8, 1, 1.25, 5], [0.2, 0.8, 1, 1.25, 5]),
        ("grpo", [0.2, 0.8, 1, 0, 0], [0, 0.8, 1, 1.25, 5]),
        ("rec", [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]),
        ("topr", [1, 1, 1, 1, 1], [0.2, 0.8, 1, 1, 1]),
        ("tis", [0.2, 0.8, 1, 1.25, 2], [0.2, 0.8, 1, 1.25, 2]),
    ],
)
def test_pushes_that_can_be_said_by_hand(name, positive, negative):
    seen = gallery.push(name, RATIOS)
    # verl makes its weights in float32.
    assert_close(seen.positive, torch.tensor(positive, dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(seen.negative, torch.tensor(negative, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_on_policy_token_is_pushed_as_by_reinforce_by_every_preset():
    for name in gallery.presets():
        seen = gallery.push(name, torch.ones(1, dtype=torch.float64))
        assert (seen.positive.item(), seen.negative.item()) == pytest.approx((1, 1), abs=1e-6), name


def test_the_committed_table_is_that_of_the_code():
    committed = TABLE.read_text().splitlines()
    names = ["m2po", "bapo", "sapo", "decoupled_loglinear"]
    for row in gallery.markdown_table(names).splitlines():
        assert row in committed


def test_every_preset_has_a_figure():
    assert {path.stem for path in TABLE.parent.glob("*.svg")} == {*gallery.presets(), "advantages"}


def test_every_preset_has_a_row_with_its_figure():
    rows = [line for line in (REPOSITORY / "docs/methods.md").read_text().splitlines() if line.startswith("|")]
    for name in set(gallery.presets()) - {"asymre", "red_drop", "red_weight", "max_at_k"}:
        assert any(f"| `{name}` |" in row and f"figures/methods/{name}.svg)" in row for row in rows), name


def test_every_preset_has_trained_end_to_end():
    runs = [json.loads(line) for line in TABLE.with_name("runs.jsonl").read_text().splitlines()]
    assert [run["method"] for run in runs if not run["problems"]] == gallery.presets()


def test_the_cost_column_is_that_of_the_benchmarks():
    measured = re.findall(r"^\| `(\w+)` \| \d+ \| ([\d.]+) \|$", (REPOSITORY / "docs/benchmarks.md").read_text(), re.M)
    assert {name for name, _ in measured} == set(gallery.presets())
    text = (REPOSITORY / "docs/methods.md").read_text()
    for name, times_vanilla in measured:
        assert re.search(rf"^\| [^|]+ \| `{name}` \|(?: !\[[^|]+\|)? {times_vanilla}(?: \+ [Ff])? \|", text, re.M), name


def test_advantages_of_a_group():
    right, wrong = gallery.advantage_table("oapl", size=4)
    assert right[0] - wrong[0] == pytest.approx(1) and wrong[0] == pytest.approx(-0.357374, abs=1e-6)
