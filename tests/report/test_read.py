import json
import math

import pytest
from report_logs import write_log

from verl_m2po.report.reading.read import is_json_log, read_event_file, read_json_lines

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter


def test_what_verls_own_file_logger_wrote_comes_back(tmp_path, monkeypatch):
    """The format is pinned by verl's writer, NaN included (orjson writes it as null)."""
    tracking = pytest.importorskip("verl.utils.tracking")
    path = tmp_path / "run.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    logger = tracking.FileLogger("project", "experiment")
    logger.log({"actor/grad_norm": 0.25, "critic/values/mean": float("nan")}, step=3)
    logger.finish()
    log = read_json_lines(path)
    assert list(log.rows) == [3]
    assert log.rows[3]["actor/grad_norm"] == 0.25
    assert math.isnan(log.rows[3]["critic/values/mean"])
    assert log.problems == []


@pytest.mark.parametrize("cut", ['{"step": 3, "da', '{"step"', "{", '{"step": 3, "data": {"a": 1'])
def test_a_cut_last_line_costs_only_itself(tmp_path, cut):
    path = write_log(tmp_path / "run.jsonl", {1: {"a": 1.0}, 2: {"a": 2.0}}, cut=cut)
    log = read_json_lines(path)
    assert log.frame()["a"].to_dict() == {1: 1.0, 2: 2.0}
    assert len(log.problems) == 1 and "last line (3) is cut" in log.problems[0]


@pytest.mark.parametrize("whole", range(1, 30))
def test_a_log_cut_at_any_byte_gives_the_whole_lines_before_it(tmp_path, whole):
    rows = {step: {"a": float(step), "b": 0.5} for step in range(1, 30)}
    path = write_log(tmp_path / "run.jsonl", rows)
    data = path.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    path.write_bytes(data[: ends[whole - 1] - 1])
    assert list(read_json_lines(path).rows) == list(range(1, whole))


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '{"step": 1}',
        '{"step": "1", "data": {}}',
        '{"step": true, "data": {}}',
        '{"step": -1, "data": {}}',
        '{"step": 1e3, "data": {}}',
        '{"step": 99999999999999999999, "data": {}}',
        '{"step": 1, "data": [1]}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_lines_that_are_not_records_are_counted_not_raised(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"step": 1, "data": {{"a": 1}}}}\n{line}\n{{"step": 2, "data": {{"a": 2}}}}\n')
    log = read_json_lines(path)
    assert sorted(log.rows) == [1, 2]
    assert "1 line(s)" in log.problems[0] and "first line 2" in log.problems[0]


def test_values_that_are_not_numbers_are_left_out_and_named(tmp_path):
    path = write_log(tmp_path / "run.jsonl", {1: {"a": 1, "text": "rm -rf", "list": [1], "flag": True}})
    log = read_json_lines(path)
    assert log.rows[1] == {"a": 1.0, "flag": 1.0}
    assert "list, text" in log.problems[0]


def test_an_integer_beyond_float_is_infinite(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "data": {"a": 1' + "0" * 400 + "}}\n")
    assert read_json_lines(path).rows[1]["a"] == math.inf


def test_an_empty_file_says_so(tmp_path):
    path = write_log(tmp_path / "run.jsonl", {})
    assert "empty" in read_json_lines(path).problems[0]


def test_dumps_of_generations_are_not_logs(tmp_path):
    dump = tmp_path / "1.jsonl"
    dump.write_text(json.dumps({"input": "1+1", "output": "2", "score": 1.0}) + "\n")
    assert not is_json_log(dump)
    assert is_json_log(write_log(tmp_path / "empty.jsonl", {}))
    assert is_json_log(write_log(tmp_path / "cut.jsonl", {}, cut='{"step": 1, "da'))
    assert is_json_log(write_log(tmp_path / "log.jsonl", {1: {"a": 1.0}}))


def test_tensorboard_events_come_back_and_a_cut_file_gives_what_is_whole(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 4):
        writer.add_scalar("actor/grad_norm", step / 10, step)
    writer.close()
    (path,) = tmp_path.iterdir()
    assert read_event_file(path).frame()["actor/grad_norm"].to_dict() == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})
    assert read_event_file(path).problems == []
    path.write_bytes(path.read_bytes()[:-5])
    log = read_event_file(path)
    assert list(log.rows) == [1, 2]
    assert len(log.problems) == 1 and "damaged or cut after byte" in log.problems[0]


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_an_event_file_without_a_readable_step_is_damaged_and_not_empty(tmp_path, damage):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("actor/grad_norm", 0.1, 1)
    writer.close()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[:-5] if damage == "cut" else data[:20] + b"\0\1\2" * 30 + data[20:])
    log = read_event_file(path)
    assert not log.rows and "damaged or cut" in log.problems[0] and "empty" not in log.problems[0]
    path.write_bytes(b"")
    assert "empty" in read_event_file(path).problems[0]
