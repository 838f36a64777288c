"""The journal gives back what was written, up to where a crash cut it off, and nothing else."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_m2po.staleness.restart.checkpoint import Checkpoints
from verl_m2po.staleness.restart.frames import (
    FinishedGroup,
    JournalError,
    RowsWriter,
    decode,
    encode,
    from_json,
    read_frames,
    to_json,
)
from verl_m2po.staleness.restart.journal import RUN_FILE, Journal
from verl_m2po.staleness.restart.resume import STATE_FILE
from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rule.records import Row, Ticket

SETTINGS = {"actor_rollout_ref.rollout.n": 2, "algorithm.gamma": 1.0, "policy_loss.threshold": float("inf")}

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda child: (
        st.lists(child, max_size=3)
        | st.lists(child, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), child, max_size=3)
    ),
    max_leaves=8,
)


def group(uid: str, version: int = 3, lengths: tuple[int, ...] = (4, 1)) -> FinishedGroup:
    rows, packed = [], []
    for session, tokens in enumerate(lengths):
        responses = torch.randint(0, 10**5, (tokens,), generator=torch.Generator().manual_seed(session))
        fields = {
            "prompts": torch.tensor([1, 2, 3]),
            "responses": responses,
            "response_mask": torch.ones_like(responses),
            "position_ids": torch.arange(3 + tokens),
            "rollout_log_probs": -responses.float() / 7,
            "rm_scores": torch.zeros(tokens),
            "extra_fields": {"reward_extra_info": {"acc": np.float32(0.5), "seen": (1, 2)}, "turns": np.arange(3)},
            "session_id": session,
        }
        rows.append(Row(f"{uid}_{session}_0", 3, tokens, ((version, tokens),)))
        packed.append(codec.pack(fields))
    return FinishedGroup(uid, tuple(rows), tuple(packed))


def assert_same(one: FinishedGroup, other: FinishedGroup) -> None:
    assert (one.uid, one.rows) == (other.uid, other.rows)
    for a, b in zip(one.packed, other.packed, strict=True):
        assert a.keys() == b.keys() and to_json(a["rest"]) == to_json(b["rest"])
        for name in a.keys() - {"rest"}:
            assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name])


def test_a_journal_in_the_home_is_where_the_preflight_looks(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    journal = Journal("~/run1/journal", fsync=False, settings=SETTINGS)
    journal.start(run=None)
    assert (tmp_path / "run1" / "journal" / RUN_FILE).is_file()
    assert journal.rows_path(0).parent == tmp_path / "run1" / "journal"


@given(plain)
def test_python_objects_come_back_as_they_were(value):
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    "value",
    [np.float32(1.5), np.int64(3), np.array([[1, 2], [3, 4]]), np.array(["a", None], dtype=object), torch.ones(2, 1)],
)
def test_arrays_come_back_with_type_and_shape(value):
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert type(again) is type(value) and again.dtype == value.dtype and again.shape == value.shape
    assert np.array_equal(np.asarray(again), np.asarray(value))


def test_what_cannot_be_stored_is_named():
    with pytest.raises(JournalError, match=r"cannot store rest.tool\[1\] of type set"):
        to_json({"tool": [1, {2}]})


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_group_comes_back_as_it_was(lengths):
    one = group("a", lengths=tuple(lengths))
    assert_same(decode(encode(one)), one)


def test_a_file_that_is_cut_off_anywhere_gives_the_groups_before(tmp_path):
    path = tmp_path / "rows"
    ends = []
    for uid in "abc":
        RowsWriter(path, fsync=False).append(group(uid))
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        found = [decode(data).uid for data in read_frames(path)]
        assert found == list("abc")[: sum(end <= size for end in ends)]


def test_a_record_that_was_changed_is_left_out_and_the_next_is_read(tmp_path):
    path = tmp_path / "rows"
    for uid in "ab":
        RowsWriter(path, fsync=True).append(group(uid))
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    assert [decode(frame).uid for frame in read_frames(path)] == ["b"]


@pytest.mark.parametrize("byte", range(4, 12))
def test_a_record_whose_length_was_changed_ends_the_file(tmp_path, byte):
    path = tmp_path / "rows"
    for uid in "ab":
        RowsWriter(path, fsync=True).append(group(uid))
    data = bytearray(path.read_bytes())
    second = len(data) // 2
    data[second + byte] ^= 0x40
    path.write_bytes(data)
    assert [decode(frame).uid for frame in read_frames(path)] == ["a"]


def test_a_full_disk_is_one_clear_error():
    with pytest.raises(JournalError, match=r"journal /dev/full cannot be written: .*No space left on device"):
        RowsWriter("/dev/full", fsync=False).append(group("a"))


def ticket(place: int, version: int = 0) -> Ticket:
    return Ticket(f"u{place}", place, version, place // 4, place)


def test_events_come_back_in_order_from_the_segment_of_the_checkpoint_on(tmp_path):
    journal = Journal(tmp_path, False, SETTINGS)
    journal.start(None)
    journal.dispatched([ticket(0), ticket(1)])
    journal.next_segment()
    position = journal.position()
    journal.dispatched([ticket(2)])
    journal.failed("u2")
    with (tmp_path / "000002.events.jsonl").open("a") as file:
        file.write('["dispatched",[["u3"')  # cut off
    again = Journal(tmp_path, False, SETTINGS)
    again.start(position["run"])
    again.dispatched([ticket(1, version=5)], again=True)
    replay = Journal(tmp_path, False, SETTINGS).read(position["segment"], 0, [], [])
    assert replay.events == [("dispatched", [ticket(2)]), ("failed", "u2"), ("again", [ticket(1, version=5)])]
    assert len(again.read(1, 0, [], []).events) == 4


def test_only_groups_that_the_run_waits_for_come_back_and_the_last_record_of_one_counts(tmp_path):
    journal = Journal(tmp_path, False, SETTINGS)
    journal.start(None)
    RowsWriter(journal.rows_path(0), False).append(group("flew before", version=1))
    RowsWriter(journal.rows_path(0), False).append(group("trained before"))
    journal.next_segment()
    journal.dispatched([ticket(2)])
    RowsWriter(journal.rows_path(1), False).append(group("u2", version=6))
    RowsWriter(journal.rows_path(2), False).append(group("u2", version=7))
    replay = journal.read(2, 1, ["flew before", "never came"], [])
    assert {uid: found.newest_version for uid, found in replay.finished.items()} == {"flew before": 1, "u2": 7}


def test_under_other_settings_what_the_lost_weights_generated_is_not_taken(tmp_path):
    journal = Journal(tmp_path, False, SETTINGS)
    journal.start(None)
    journal.dispatched([ticket(0), ticket(1)])
    RowsWriter(journal.rows_path(0), False).append(group("u0", version=4))
    RowsWriter(journal.rows_path(0), False).append(group("u1", version=5))
    assert journal.read(1, 4, [], []).finished.keys() == {"u0", "u1"}
    other = Journal(tmp_path, False, SETTINGS | {"policy_loss.threshold": 0.1})
    assert other.read(1, 4, [], list(SETTINGS)[:1]).finished.keys() == {"u0"}
    with pytest.raises(JournalError, match=r"policy_loss.threshold=0.1: the journal .* was written with inf"):
        other.read(1, 4, [], ["policy_loss.threshold"])


def test_the_journal_of_another_run_is_not_used_and_nothing_else_is_deleted(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    checkpoint = tmp_path / "global_step_2"
    checkpoint.mkdir()
    journal = Journal(tmp_path, False, SETTINGS)
    assert journal.position_of(None) is None and journal.position_of(checkpoint) is None
    journal.start(None)
    assert journal.position_of(None) == journal.position()
    (checkpoint / RUN_FILE).write_text(json.dumps(journal.position()))
    other = Journal(tmp_path, False, SETTINGS)
    other.start(None)
    assert other.position_of(checkpoint) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "000001.events.jsonl",
        "global_step_2",
        RUN_FILE,
        "mine.txt",
    ]


def test_a_journal_that_begins_at_a_checkpoint_without_one_is_that_checkpoints(tmp_path):
    """The first restart with a journal, and a crash before the next checkpoint."""
    one, other = tmp_path / "global_step_4", tmp_path / "other" / "global_step_4"
    for folder in (one, other):
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text(json.dumps({"of": str(folder)}))
    journal = Journal(tmp_path / "journal", False, SETTINGS)
    assert journal.position_of(one) is None
    journal.start(None, after=one)
    journal.dispatched([ticket(0)])
    begun = {"run": journal.recorded_run(), "segment": 1}
    again = Journal(tmp_path / "journal", False, SETTINGS)
    assert again.position_of(None) is None, "it does not go back to the beginning of the run"
    assert again.position_of(other) is None, "nor to another checkpoint of that step"
    moved = one.rename(tmp_path / "moved")
    assert again.position_of(moved) == begun
    again.start(begun["run"], after=moved)
    assert again.position_of(moved) == begun and again.read(1, 4, [], []).events == [("dispatched", [ticket(0)])]


def begin_again(tmp_path, position, *events) -> None:
    """A run goes on from the checkpoint at `position`, dispatches, and dies."""
    journal = Journal(tmp_path, False, SETTINGS)
    journal.start(position["run"], read_from=position["segment"])
    journal.dispatched(list(events))


def test_what_a_run_did_that_was_rewound_is_not_taken_for_what_came_after_a_later_checkpoint(tmp_path):
    journal, positions = Journal(tmp_path, False, SETTINGS), []
    journal.start(None)
    for place in range(3):
        journal.next_segment()
        positions.append(journal.position())
        journal.dispatched([ticket(place)])
    begin_again(tmp_path, positions[1], ticket(10))
    begin_again(tmp_path, positions[2], ticket(20))
    begin_again(tmp_path, {"run": positions[1]["run"], "segment": 5}, ticket(30))  # a checkpoint of the first of these
    read = [
        [ticket.place for _, tickets in journal.read(position["segment"], 0, [], []).events for ticket in tickets]
        for position in positions
    ]
    assert read == [[0, 1, 2, 10, 20, 30], [1, 2, 10, 20, 30], [2, 20]]


def test_segments_that_no_checkpoint_needs_are_deleted(tmp_path):
    checkpoints, journal = Checkpoints(tmp_path / "checkpoints"), Journal(tmp_path / "journal", False, SETTINGS)
    journal.start(None)
    for step in range(1, 9):
        RowsWriter(journal.rows_path(0), False).append(group(f"g{step}"))
        journal.next_segment()
        with checkpoints.writing(step) as incomplete:
            (incomplete / f"global_step_{step}" / RUN_FILE).write_text(json.dumps(journal.position()))
        checkpoints.prune(step, keep=2)
        journal.delete_unneeded(checkpoints)
    left = sorted({int(path.name[:6]) for path in (tmp_path / "journal").glob("0*")})
    assert left == [7, 8, 9], "of the checkpoints in segments 8 and 9, and the one before"
    assert not journal.begins_after(None) and journal.position_of(None) is None
