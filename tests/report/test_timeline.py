"""The timeline says of every moment which weights generated, and of every batch when it was trained."""

import json

import pytest
from matplotlib.colors import to_hex
from typer.testing import CliRunner

from verl_m2po.cli.main import app
from verl_m2po.report.drawing.timeline import TRAINING, VERSION_COLOURS, LedgerError, read_ledger, timeline


def line(step: int, sampled_at: float, generated, weights_at: float | None = None) -> dict:
    """Step s starts from weights s - 1, which are there since second s."""
    at = float(step) if weights_at is None else weights_at
    return {"step": step, "version": step - 1, "weights_at": at, "sampled_at": sampled_at, "generated": generated}


def write(path, *lines) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_mini_batches_of_a_step_are_one_step(tmp_path):
    write(tmp_path / "l", line(1, 1.5, [[0.0, 1.0]]), line(1, 1.7, [[0.5, 1.6], None]), line(2, 2.1, [[1.0, 2.0]]))
    first, second = read_ledger(tmp_path / "l")
    assert first.generated == [(0.0, 1.0), (0.5, 1.6)] and first.sampled_at == 1.5
    assert second.step == 2


def test_steps_that_were_trained_again_after_a_crash_count_once(tmp_path):
    again = [{"resumed_from": 1}, line(2, 20.5, [], weights_at=20.0)]
    write(tmp_path / "l", *(line(step, step + 0.5, []) for step in (1, 2, 3)), *again)
    assert [(step.step, step.sampled_at) for step in read_ledger(tmp_path / "l")] == [(1, 1.5), (2, 20.5)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{}\n", "line 1 .* KeyError"),
        ('{"step": 1, "version": 0}\n', "weights_at"),
        ("no json\n", "line 1"),
    ],
)
def test_what_is_no_ledger_is_refused(tmp_path, text, message):
    (tmp_path / "l").write_text(text)
    with pytest.raises(LedgerError, match=message):
        read_ledger(tmp_path / "l")


def bars(figure) -> dict[str, list[tuple[float, float]]]:
    """(start, end) of the bars of each colour."""
    found: dict[str, list[tuple[float, float]]] = {}
    for collection in figure.axes[0].collections:
        for path in collection.get_paths():
            box = path.get_extents()
            found.setdefault(to_hex(collection.get_facecolor()[0]).upper(), []).append((box.x0, box.x1))
    return found


def test_a_generation_changes_colour_where_the_weights_change(tmp_path):
    """From 1.2 to 2.6 with new weights at 2: v0, then v1. Trained from 2.7 until the next weights at 3."""
    write(tmp_path / "l", line(1, 1.1, [[0.5, 1.0]]), line(2, 2.7, [[1.2, 2.6]]), line(3, 3.5, [[2.0, 3.4]]))
    drawn = bars(timeline(read_ledger(tmp_path / "l"), first=2, count=1))
    assert drawn[VERSION_COLOURS[0].upper()] == [pytest.approx((0.0, 0.8))]
    assert drawn[VERSION_COLOURS[1].upper()] == [pytest.approx((0.8, 1.4))]
    assert drawn[TRAINING.upper()] == [pytest.approx((1.5, 1.8))]


def test_the_command_writes_the_picture_or_says_what_is_wrong(tmp_path):
    write(tmp_path / "l", line(1, 1.5, [[0.0, 1.0]]), line(2, 2.1, [[1.0, 2.0]]))

    def run(*arguments: str):
        return CliRunner().invoke(app, ["timeline", str(tmp_path / "l"), *arguments])

    assert run("--out", str(tmp_path / "new" / "t.svg")).exit_code == 0
    picture = (tmp_path / "new" / "t.svg").read_bytes()
    run("--out", str(tmp_path / "t.svg"))
    assert (tmp_path / "t.svg").read_bytes() == picture, "the same ledger gives the same file"
    refused = run("--first", "7")
    assert refused.exit_code == 2 and "trainer steps 1 to 2" in refused.output
    assert run("--out", "picture.gif").exit_code == 2
