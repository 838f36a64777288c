"""The timeline says of every moment which weights generated, and of every batch when it was trained."""

import json

import pytest
from matplotlib.colors import to_hex
from typer.testing import CliRunner

from verl_m2po.cli.main import app
from verl_m2po.report.drawing.timeline import TRAINING, VERSION_COLOURS, timeline
from verl_m2po.report.reading.ledger import LedgerError, read_ledger


def line(step: int, sampled_at: float, generated, weights_at: float | None = None) -> dict:
    """Step s starts from weights s - 1, which are there since second s."""
    at = float(step) if weights_at is None else weights_at
    return {"step": step, "version": step - 1, "weights_at": at, "sampled_at": sampled_at, "generated": generated}


def write(path, *lines) -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))


def test_mini_batches_of_a_step_are_one_step(tmp_path):
    write(tmp_path / "l", line(1, 1.5, [[0.0, 1.0]]), line(1, 1.7, [[0.5, 1.6], None]), line(2, 2.1, [[1.0, 2.0]]))
    first, second = read_ledger(tmp_path / "l").steps
    assert first.generated == [(0.0, 1.0), (0.5, 1.6)] and first.sampled_at == 1.5
    assert second.step == 2


def test_steps_that_were_trained_again_after_a_crash_count_once(tmp_path):
    again = [{"resumed_from": 1}, line(2, 20.5, [], weights_at=20.0)]
    write(tmp_path / "l", *(line(step, step + 0.5, []) for step in (1, 2, 3)), *again)
    assert [(step.step, step.sampled_at) for step in read_ledger(tmp_path / "l").steps] == [(1, 1.5), (2, 20.5)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights_at": None}, "weights_at is None; it must be a number"),
        ({"sampled_at": True}, "sampled_at is True; it must be a number"),
        ({"step": "1"}, "step is '1'; it must be a whole number"),
        ({"step": 1.5}, "step is 1.5; it must be a whole number"),
        ({"version": [0]}, r"version is \[0\]; it must be a whole number"),
        ({"weights_at": float("inf")}, "weights_at is inf"),
        ({"sampled_at": 10**400}, "sampled_at is 1000"),
        ({"generated": [["0", 1.0]]}, "generated is '0'"),
        ({"generated": [[1.0]]}, "ValueError"),
        ({"servers_lost_at": [None]}, "servers_lost_at is None"),
        ({"generated": [None], "groups": [[0, "uid", 0, [["row", [[None, 5]]]]]]}, "version is None"),
        ({"resumed_from": "1"}, "resumed_from is '1'"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, change, says):
    write(tmp_path / "l", line(1, 1.5, [[0.0, 1.0]]), line(2, 2.5, [[1.0, 2.0]]) | change)
    with pytest.raises(LedgerError, match=f"entry 2 of .* is not a ledger's: .*{says}"):
        read_ledger(tmp_path / "l")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{}\n", "entry 1 .* KeyError"),
        ('{"step": 1, "version": 0}\n', "generated"),
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


def test_deaths_of_servers_are_drawn_where_they_fall_into_the_picture(tmp_path):
    steps = [line(number, number + 0.5, [[number - 0.5, number + 0.4]]) for number in range(1, 5)]
    steps[2] |= {"servers_lost_at": [1.9], "servers_joined_at": [2.6]}
    steps[3] |= {"servers_lost_at": [100.0]}
    write(tmp_path / "l", *steps)
    history = read_ledger(tmp_path / "l")
    assert history.servers_lost_at == [1.9, 100.0] and history.servers_joined_at == [2.6]
    (axes,) = timeline(history, first=2, count=2).axes
    marks = {text.get_text(): text.get_position()[0] for text in axes.texts if "server" in text.get_text()}
    assert marks == {"server dies": pytest.approx(0.4), "server joins": pytest.approx(1.1)}


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
    below_a_file = run("--out", str(tmp_path / "l" / "t.svg"))
    assert below_a_file.exit_code == 2 and "cannot be written" in below_a_file.output


@pytest.mark.parametrize("content", [bytes(range(256)) * 8, b"\xff\xfe{\x00", None])
def test_the_command_says_of_a_binary_file_or_a_folder_that_it_is_no_ledger(tmp_path, content):
    ledger = tmp_path / "ledger"
    ledger.mkdir() if content is None else ledger.write_bytes(content)
    refused = CliRunner().invoke(app, ["timeline", str(ledger), "--out", str(tmp_path / "t.svg")])
    assert refused.exit_code == 2 and not isinstance(refused.exception, ValueError), refused.output
    assert "Error" in refused.output


def test_a_step_that_is_redone_right_after_itself_is_the_later_one(tmp_path):
    """Killed in step 30, resumed after 29: natural where every step is saved."""
    before = [line(29, 24.5, [], weights_at=24.0), line(30, 30.0, [[25.0, 26.0]], weights_at=27.0)]
    again = [{"resumed_from": 29}, line(30, 130.0, [[125.0, 126.0]], weights_at=124.0)]
    write(tmp_path / "l", *before, *again)
    last = read_ledger(tmp_path / "l").steps[-1]
    assert (last.sampled_at, last.generated, last.down_since) == (130.0, [(125.0, 126.0)], 30.0)


def test_torn_lines_are_skipped_and_counted(tmp_path):
    whole = [json.dumps(line(step, step + 0.5, [])).encode() for step in (1, 2)]
    (tmp_path / "l").write_bytes(whole[0] + b"\n" + whole[1][:9] + b"\n\xff\xfe\n" + whole[1] + b"\n")
    history = read_ledger(tmp_path / "l")
    assert [step.step for step in history.steps] == [1, 2] and history.torn == 2


def restarted(tmp_path):
    """Steps 1 to 3 end after 0.5 s; down from 3.5 to 93; of step 4's groups a journal kept one of v2 and one of v1."""
    uid = [0, "uid", 0]
    kept = [[*uid, [["row", [[version, 5]]]]] for version in (2, 1)]
    before = [line(step, step + 0.5, [[step - 0.5, float(step)]]) for step in (1, 2, 3)]
    after = line(4, 95.0, [None, None, [93.5, 94.0]], weights_at=93.0) | {"groups": [*kept, kept[0]]}
    write(tmp_path / "l", *before, {"resumed_from": 3}, after, line(5, 97.0, [[95.0, 96.0]], weights_at=96.0))
    return read_ledger(tmp_path / "l")


def test_downtime_is_no_step(tmp_path):
    history = restarted(tmp_path)
    assert {step.step: step.ended_at for step in history.steps} == {1: 2.0, 2: 3.0, 3: None, 4: 96.0, 5: None}
    assert [step.down_since for step in history.steps] == [None, None, None, 3.5, None]
    trained = sorted(bars(timeline(history))[TRAINING.upper()])
    # The median of 0.5, 0.5 and 1.0 s where the end is unknown: after step 3 and after the last.
    assert trained == [pytest.approx(bar) for bar in ((1.0, 1.5), (2.0, 2.5), (3.0, 3.5), (94.5, 95.5), (96.5, 97.0))]


def test_groups_that_were_kept_over_a_restart_are_drawn_where_their_weights_were_held(tmp_path):
    drawn = bars(timeline(restarted(tmp_path), first=4, count=1))
    # From v1 at second 2 on; v2 came at 3, and the last sign of life is at 3.5.
    assert drawn[VERSION_COLOURS[1].upper()] == [pytest.approx((0.0, 1.0))]
    assert drawn[VERSION_COLOURS[2].upper()] == [pytest.approx((1.0, 1.5))]
    assert drawn[VERSION_COLOURS[3].upper()] == [pytest.approx((91.5, 92.0))]
