"""Counting: failures, metrics, the ledger."""

import json

import pytest

from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.account.metrics import LengthBias, StalenessMetrics
from verl_m2po.staleness.rule.failures import FailureWindow, TooManyFailures
from verl_m2po.staleness.rule.records import Group, GroupReport, Row, Ticket
from verl_m2po.staleness.rule.units import UpdateClock, UpdateCount


def group(*rows: tuple[tuple[int, int], ...], uid: str = "u") -> Group:
    return Group(
        Ticket(uid, 0, 0, 0, prompt_index=5),
        tuple(Row(f"{uid}_{i}_0", 2, sum(t for _, t in spans), spans) for i, spans in enumerate(rows)),
    )


def test_too_many_failures_stop_the_run_with_each_distinct_error_once():
    window = FailureWindow(max_failed_fraction=0.2, window=10)
    for _ in range(8):
        window.kept()
    window.failed("TimeoutError: slow")
    window.failed("TimeoutError: slow")
    window.kept()
    with pytest.raises(TooManyFailures, match="3 of the last 10") as stopped:
        window.failed("ValueError: odd")
    assert str(stopped.value).count("TimeoutError: slow") == 1 and "1 x ValueError: odd" in str(stopped.value)


def test_nothing_is_judged_before_the_window_is_full():
    window = FailureWindow(max_failed_fraction=0.0, window=5)
    for _ in range(4):
        window.failed("x")
    with pytest.raises(TooManyFailures):
        window.failed("x")


def test_old_failures_are_forgotten():
    window = FailureWindow(max_failed_fraction=0.2, window=10)
    for _ in range(100):
        for _ in range(9):
            window.kept()
        window.failed("x")  # raises if it still sees the one before the last ten


def test_masked_trajectories_count_as_their_share_of_a_group():
    """Three tenths of every group are exactly what may fail; the first group that loses more ends the run."""
    window = FailureWindow(max_failed_fraction=0.3, window=100)
    for _ in range(1000):
        window.kept(3 / 10, ["TimeoutError: slow"])  # added up one by one, a hundred of them are 30.00000000000005
    with pytest.raises(TooManyFailures, match=r"^30\.1 of the last 100") as stopped:
        window.kept(4 / 10, ["ValueError: odd", "ValueError: odd"])
    assert "98 x TimeoutError: slow" in str(stopped.value) and "2 x ValueError: odd" in str(stopped.value)


def test_the_window_goes_on_where_it_was_and_reads_that_of_an_older_version():
    before = FailureWindow(max_failed_fraction=0.2, window=4)
    before.kept()
    before.kept(0.5, ["x"])
    after = FailureWindow(max_failed_fraction=0.2, window=4)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    after.kept()
    with pytest.raises(TooManyFailures, match=r"1\.5 of the last 4"):
        after.failed("y")
    older = FailureWindow(max_failed_fraction=0.2, window=4)
    older.load_state_dict({"failed": [False, True, False], "errors": ["x"]})
    with pytest.raises(TooManyFailures, match="2 of the last 4"):
        older.failed("y")


def test_ages_are_those_of_the_updates_that_were_made():
    """Two updates a step are configured, four were made in step 5: what is one step behind is 4 updates old."""
    clock = UpdateClock(8, 4)
    count = UpdateCount(clock)
    count.add(5, 4)
    metrics = StalenessMetrics(clock, count)
    metrics.trained((group(((4, 30), (5, 10))),), version=5, oldest_version=None)
    taken = metrics.take(in_flight=0, ready=0)
    assert taken["staleness/age_updates_max"] == 4
    assert taken["staleness/age_updates_mean"] == pytest.approx(30 * 4 / 40)
    assert taken["staleness/age_share/steps_to_1"] == 30 / 40, "steps are steps"


def test_the_ledger_counts_the_updates_that_were_made(tmp_path):
    count = UpdateCount(UpdateClock(8, 4))
    ledger = TrainedRowsLedger(str(tmp_path / "rows.jsonl"), count)
    for step in (1, 2):
        for _ in range(2):  # mini-batches
            ledger.trained(step, step - 1, None, (group(((0, 3),)),))
            count.add(step, 2)
    lines = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [line["updates_before"] for line in lines] == [0, 2, 4, 6]


def test_ages_are_weighted_by_tokens_and_counted_in_updates():
    """From version 5 with 4 updates a step: 10 tokens of version 5, 30 of version 3 are 0 and 8 updates old."""
    metrics = StalenessMetrics(UpdateClock(8, 2))
    metrics.trained((group(((3, 30), (5, 10))),), version=5, oldest_version=None)
    taken = metrics.take(in_flight=2, ready=3)
    assert taken["staleness/age_updates_mean"] == pytest.approx((30 * 8 + 10 * 0) / 40)
    assert taken["staleness/age_updates_max"] == 8
    assert taken["staleness/spans_mean"] == 2
    assert (taken["staleness/depth"], taken["staleness/waiting"]) == (5, 3)
    assert taken["staleness/age_share/steps_to_0"] == 0.25 and taken["staleness/age_share/steps_to_2"] == 0.75


def test_masked_tokens_have_no_age():
    metrics = StalenessMetrics(UpdateClock(8, 2))
    metrics.trained((group(((1, 30), (5, 10))),), version=5, oldest_version=4)
    taken = metrics.take(0, 0)
    assert (taken["staleness/over_age_tokens"], taken["staleness/trained_tokens"]) == (30, 10)
    assert taken["staleness/age_updates_max"] == 0


def test_masked_trajectories_are_counted_and_change_no_other_number():
    """A copy of 30 tokens that trains nothing: no tokens, no age, no trajectory, and no shorter group."""
    rows = (((1, 30), (5, 10)), ((5, 4),))
    whole, masked = group(*rows), group(*rows, ((1, 0), (5, 0)))
    assert [row.is_masked for row in masked.rows] == [False, False, True] and masked.masked_share == 1 / 3
    assert masked.tokens_per_response == whole.tokens_per_response == 22
    taken = []
    for each in (whole, masked):
        metrics = StalenessMetrics(UpdateClock(8, 2))
        metrics.masked(sum(row.is_masked for row in each.rows))
        metrics.trained((each,), version=5, oldest_version=4)
        metrics.dropped(each)
        taken.append(metrics.take(0, 0) | {"staleness/tokens_per_s": 0} | {"bias": metrics.state_dict()})
    assert [numbers.pop("staleness/masked_trajectories") for numbers in taken] == [0, 1]
    assert taken[0] == taken[1]


def test_age_shares_are_a_distribution_however_old():
    metrics = StalenessMetrics(UpdateClock(8, 8))
    metrics.trained(tuple(group(((version, 7),)) for version in range(300)), version=300, oldest_version=None)
    shares = {k: v for k, v in metrics.take(0, 0).items() if "age_share" in k}
    assert sum(shares.values()) == pytest.approx(1) and "staleness/age_share/steps_over_128" in shares


def test_a_step_starts_from_zero():
    metrics = StalenessMetrics(UpdateClock(8, 8))
    metrics.admitted(4)
    metrics.failed()
    metrics.dropped(group(((0, 3),)))
    first, second = metrics.take(0, 0), metrics.take(0, 0)
    assert (first["staleness/admitted"], first["staleness/evicted"]) == (4, 2)
    assert (second["staleness/admitted"], second["staleness/evicted"]) == (0, 0)


def test_names_do_not_trigger_verls_reduction_by_name():
    """verl takes max, min or sum of a metric whose name contains the word."""
    metrics = StalenessMetrics(UpdateClock(8, 8))
    for i in range(20):
        metrics.trained((group(((0, 1 + i),), uid=str(i)),), 0, None)
    for name in metrics.take(0, 0):
        if name != "staleness/age_updates_max":
            assert not any(word in name for word in ("max", "min", "sum", "total")), name


def test_drop_rates_show_which_lengths_are_dropped():
    bias = LengthBias()
    for tokens in range(100):
        bias.add(tokens, was_dropped=tokens >= 90)
    assert bias.drop_rates() == [0.0] * 9 + [1.0]
    assert LengthBias().drop_rates() == []


def test_the_ledger_continues_an_existing_file(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    for step in (1, 2):
        TrainedRowsLedger(str(path)).trained(step, step - 1, None, (group(((0, 3),), uid=f"u{step}"),))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["groups"] == [[5, "u2", 0, [["u2_0_0", [[0, 3]]]]]]


def test_the_ledger_knows_when_a_group_was_generated(tmp_path):
    """Of a group from before a restart it does not; of one that was evicted it forgets."""
    ledger = TrainedRowsLedger(str(tmp_path / "rows.jsonl"))
    groups = tuple(group(((0, 3),), uid=uid) for uid in ("known", "restored", "evicted"))
    for uid in ("known", "evicted"):
        ledger.finished(GroupReport(uid, (), began_at=10.0, finished_at=12.5))
    ledger.evicted(groups[2:])
    ledger.advanced()
    ledger.trained(1, 0, None, groups)
    (line,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert line["generated"] == [[10.0, 12.5], None, None]
    assert line["weights_at"] <= line["sampled_at"]
