"""The ledger across restarts: what was trained twice because its weights were lost can be told from what counts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.staleness.account.ledger import TrainedRowsLedger, read_ledger, surviving
from verl_m2po.staleness.rule.records import Group, Row, Ticket


def group(step: int, attempt: int) -> Group:
    uid = f"s{step}a{attempt}"
    return Group(Ticket(uid, step, step - 1, step, step), (Row(f"{uid}_0_0", 1, 3, ((step - 1, 3),)),))


def train(ledger: TrainedRowsLedger, first: int, last: int, attempt: int) -> None:
    for step in range(first, last + 1):
        ledger.trained(step, step - 1, None, (group(step, attempt),))


@given(stops=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), max_size=4))
def test_the_surviving_batches_are_one_of_each_step_from_the_attempt_that_counts(tmp_path_factory, stops):
    path = tmp_path_factory.mktemp("ledger") / "rows.jsonl"
    step, expected = 0, {}
    for attempt, (trained, lost) in enumerate([*stops, (3, 0)]):
        ledger = TrainedRowsLedger(str(path))
        ledger.resumed(step)
        expected = {kept: by for kept, by in expected.items() if kept <= step}
        train(ledger, step + 1, step + trained, attempt)
        expected |= {new: attempt for new in range(step + 1, step + trained + 1)}
        step = max(0, step + trained - lost)
    batches = surviving(read_ledger(path))
    assert [(batch["step"], batch["groups"][0][1]) for batch in batches] == [
        (step, f"s{step}a{attempt}") for step, attempt in sorted(expected.items())
    ]


def test_a_torn_last_line_is_left_out_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    ledger = TrainedRowsLedger(str(path))
    train(ledger, 1, 3, attempt=0)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        again = TrainedRowsLedger(str(path))
        again.resumed(0)
        train(again, 1, 1, attempt=1)
        assert [batch["groups"][0][1] for batch in surviving(read_ledger(path))] == ["s1a1"]
        complete = whole[:size].count(b"\n") + (whole[size : size + 1] == b"\n")
        assert len(read_ledger(path)) == complete + 2


def test_a_line_is_plain_json_with_every_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    train(TrainedRowsLedger(str(path)), 4, 4, attempt=0)
    line = json.loads(path.read_text())
    assert line["sampled_at"] >= line["weights_at"] > 1e9
    assert {key: line[key] for key in ("step", "version", "oldest_version", "groups")} == {
        "step": 4,
        "version": 3,
        "oldest_version": None,
        "groups": [[4, "s4a0", 4, [["s4a0_0_0", [[3, 3]]]]]],
    }


@pytest.mark.parametrize("name", ["", "file/rows.jsonl"])
def test_a_ledger_that_cannot_be_written_is_one_clear_error(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"ledger_path=.*the ledger cannot be written .*or to null"):
        TrainedRowsLedger(str(tmp_path / name))


def test_bytes_that_are_no_text_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    train(TrainedRowsLedger(str(path)), 1, 2, attempt=0)
    path.write_bytes(path.read_bytes() + b"\xff\xfe{\n")
    train(TrainedRowsLedger(str(path)), 3, 3, attempt=0)
    assert [batch["step"] for batch in surviving(read_ledger(path))] == [1, 2, 3]
