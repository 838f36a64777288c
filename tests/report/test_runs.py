from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_logs import write_config, write_log

from verl_m2po.report.reading.read import Log
from verl_m2po.report.reading.runs import find_sources, join_attempts, read_run, read_runs

SummaryWriter = pytest.importorskip("torch.utils.tensorboard").SummaryWriter


def rows(first: int, last: int, value: float) -> dict[int, dict]:
    return {step: {"critic/score/mean": value} for step in range(first, last + 1)}


def test_a_later_attempt_wins_where_attempts_overlap(tmp_path):
    write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 60, 1.0))
    write_log(tmp_path / "run/attempt-2.jsonl", rows(51, 100, 2.0))
    (run,), problems = read_runs([tmp_path / "run"])
    assert run.name == "run"
    assert run.series("critic/score/mean").to_dict() == {s: 1.0 if s <= 50 else 2.0 for s in range(1, 101)}
    assert problems == []


@pytest.mark.parametrize("name", ["metrics", "attempt-1", "some-run"])
def test_logs_that_were_moved_aside_for_a_later_attempt_come_first(tmp_path, name):
    for attempt in range(1, 12):
        write_log(tmp_path / f"run/{name}.attempt-{attempt}.jsonl", rows(attempt, attempt + 1, attempt))
    write_log(tmp_path / f"run/{name}.jsonl", rows(12, 13, 12))
    for path in (tmp_path / "run", tmp_path / f"run/{name}.jsonl"):
        (run,), problems = read_runs([path])
        assert run.name == ("some-run" if name == "some-run" else "run") and problems == []
        assert run.series("critic/score/mean").to_dict() == {s: min(s, 12) for s in range(1, 14)}


def test_runs_in_one_folder_keep_their_own_attempts(tmp_path):
    for run, value in (("a", 1.0), ("b", 2.0)):
        write_log(tmp_path / f"{run}.attempt-1.jsonl", rows(1, 4, value))
        write_log(tmp_path / f"{run}.jsonl", rows(3, 6, value + 10))
    runs, problems = read_runs([tmp_path])
    assert [run.name for run in runs] == ["a", "b"] and problems == []
    assert [run.series("critic/score/mean").tolist() for run in runs] == [
        [1, 1, 11, 11, 11, 11],
        [2, 2, 12, 12, 12, 12],
    ]


def test_attempts_are_ordered_by_number_not_by_letter(tmp_path):
    for attempt in range(1, 12):
        write_log(tmp_path / f"run/attempt-{attempt}.jsonl", rows(attempt, attempt + 1, attempt))
    (run,), _ = read_runs([tmp_path / "run"])
    assert run.series("critic/score/mean").to_dict() == {s: min(s, 11) for s in range(1, 13)}


def test_steps_of_discarded_weights_are_dropped_and_named(tmp_path):
    """Attempt 1 got to step 80 with its last checkpoint at 50; attempt 2 died at 60. Steps 61..80 are gone."""
    write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 80, 1.0))
    write_log(tmp_path / "run/attempt-2.jsonl", rows(51, 60, 2.0))
    (run,), problems = read_runs([tmp_path / "run"])
    assert run.frame.index[-1] == 60
    assert "steps 61 to 80" in problems[0] and "from step 51" in problems[0]


def test_the_validation_before_resuming_does_not_erase_the_step_that_it_resumes_from(tmp_path):
    write_log(tmp_path / "run/attempt-1.jsonl", rows(49, 50, 1.0))
    write_log(tmp_path / "run/attempt-2.jsonl", {50: {"val-core/a/acc/mean@1": 0.5}} | rows(51, 52, 2.0))
    (run,), _ = read_runs([tmp_path / "run"])
    assert run.series("critic/score/mean").to_dict() == {49: 1.0, 50: 1.0, 51: 2.0, 52: 2.0}
    assert run.series("val-core/a/acc/mean@1").to_dict() == {50: 0.5}


def test_an_attempt_that_died_before_its_first_step_changes_nothing(tmp_path):
    write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 5, 1.0))
    write_log(tmp_path / "run/attempt-2.jsonl", {}, cut='{"step": 6')
    (run,), problems = read_runs([tmp_path / "run"])
    assert len(run.frame) == 5
    assert len(problems) == 1 and "attempt-2" in problems[0]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1])), min_size=1, max_size=5
    )
)
def test_joining_equals_replaying_the_attempts_one_step_after_the_other(attempts):
    logs = [Log(Path(f"{n}"), rows(first, last, float(n))) for n, (first, last) in enumerate(attempts)]
    slow: dict[int, float] = {}
    for n, (first, last) in enumerate(attempts):
        slow = {step: value for step, value in slow.items() if step < first}
        for step in range(first, last + 1):
            slow[step] = float(n)
    joined, _ = join_attempts(logs)
    assert joined["critic/score/mean"].to_dict() == slow


def test_tensorboard_attempts_are_joined_too(tmp_path):
    for attempt, (first, last) in enumerate([(1, 6), (4, 8)]):
        writer = SummaryWriter(str(tmp_path / "run"), filename_suffix=f".{attempt}")
        for step in range(first, last + 1):
            writer.add_scalar("critic/score/mean", attempt, step)
        writer.close()
    (run,), _ = read_runs([tmp_path])
    assert run.series("critic/score/mean").to_dict() == {s: float(s >= 4) for s in range(1, 9)}


@pytest.mark.parametrize("writers", [(9, 10), (99, 100)])
def test_writers_of_one_second_are_in_order_of_their_number(tmp_path, writers):
    for attempt, number in enumerate(writers):
        with SummaryWriter(str(tmp_path / "run")) as writer:
            writer.add_scalar("critic/score/mean", attempt, 1)
        (written,) = set((tmp_path / "run").iterdir()) - set((tmp_path / "run").glob("*.renamed"))
        written.rename(tmp_path / "run" / f"events.out.tfevents.1700000000.host.7.{number}.renamed")
    (run,), _ = read_runs([tmp_path])
    assert run.series("critic/score/mean").to_dict() == {1: 1.0}


def test_a_tree_of_runs_in_every_layout(tmp_path):
    write_log(tmp_path / "a/attempt-1.jsonl", rows(1, 2, 1.0))
    write_log(tmp_path / "b/metrics.jsonl", rows(1, 2, 1.0))
    write_log(tmp_path / "project/experiment.jsonl", rows(1, 2, 1.0))
    write_log(tmp_path / "project/other.jsonl", rows(1, 2, 1.0))
    (tmp_path / "project/rollouts").mkdir()
    (tmp_path / "project/rollouts/1.jsonl").write_text('{"input": "x"}\n')
    runs, problems = read_runs([tmp_path])
    assert sorted(run.name for run in runs) == ["a", "b", "experiment", "other"]
    assert len(problems) == 1 and "not verl logs" in problems[0]


def test_a_run_given_twice_is_read_once(tmp_path):
    path = write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 2, 1.0))
    runs, _ = read_runs([tmp_path, tmp_path / "run", path])
    assert len(runs) == 1


@pytest.mark.parametrize(
    "paths",
    [
        ("r/a.attempt-1.jsonl", "r/a.jsonl"),
        ("r/a.attempt-1.jsonl", "r"),
        ("r", "r/a.attempt-1.jsonl"),
        ("s/attempt-1.jsonl", "s/attempt-2.jsonl"),
        ("s/attempt-1.jsonl", "s"),
        ("s", "s/attempt-2.jsonl"),
    ],
)
def test_attempts_given_file_by_file_or_beside_their_folder_are_one_run(tmp_path, paths):
    """`report r/*.jsonl`: a shell names the attempt that was moved aside first."""
    for first, second in (("r/a.attempt-1.jsonl", "r/a.jsonl"), ("s/attempt-1.jsonl", "s/attempt-2.jsonl")):
        write_log(tmp_path / first, rows(1, 6, 1.0))
        write_log(tmp_path / second, rows(5, 9, 2.0))
    (run,), problems = read_runs([tmp_path / path for path in paths])
    assert run.name == ("a" if paths[0].startswith("r") else "s") and problems == []
    assert run.series("critic/score/mean").to_dict() == {s: 1.0 if s < 5 else 2.0 for s in range(1, 10)}


def test_a_config_beside_several_logs_that_are_given_one_by_one_is_of_none(tmp_path):
    paths = [write_log(tmp_path / f"runs/{name}.jsonl", rows(1, 4, 1.0)) for name in ("m2po-s256", "grpo-s256")]
    write_config(tmp_path / "runs", algorithm__policy_loss="m2po", data__seed=1)
    for named in ([tmp_path], paths, [paths[0], tmp_path]):
        runs, _ = read_runs(named)
        assert {run.settings.loss for run in runs} == {"m2po", "grpo"}
        assert [run.settings.config for run in runs] == [{}, {}]
    (alone,), _ = read_runs(paths[:1])
    assert alone.settings.config != {}


def test_logs_of_one_folder_have_names_of_their_own(tmp_path):
    """verl calls none of them so, but people do; their metrics must not end in one run."""
    paths = [write_log(tmp_path / f"runA/{name}.jsonl", rows(1, 2, 1.0)) for name in ("log", "metrics")]
    for named in ([tmp_path], paths):
        runs, _ = read_runs(named)
        assert [run.name for run in runs] == ["runA/log", "runA/metrics"]
    write_log(tmp_path / "x/runA/log.jsonl", rows(1, 2, 1.0))
    write_log(tmp_path / "x/runA/metrics.jsonl", rows(1, 2, 1.0))
    runs, _ = read_runs([tmp_path])
    assert len({run.name for run in runs}) == 4 and "x/runA/log" in {run.name for run in runs}


def test_a_run_with_two_loggers_is_one_run_and_a_line(tmp_path):
    """`trainer.logger=[file,tensorboard]`, with the events in a folder under the log's."""
    write_log(tmp_path / "m2po-run/metrics.jsonl", rows(1, 2, 1.0))
    events = tmp_path / "m2po-run/tensorboard"
    writer = SummaryWriter(str(events))
    writer.add_scalar("critic/score/mean", 2.0, 1)
    writer.close()
    (run,), problems = read_runs([tmp_path])
    assert run.name == "m2po-run" and run.series("critic/score/mean").tolist() == [1.0, 1.0]
    assert len(problems) == 1 and "1 folder(s) of TensorBoard events" in problems[0] and str(events) in problems[0]
    assert len(read_runs([events])[0]) == 1


def test_a_log_beside_the_attempts_of_another_run_is_a_line(tmp_path):
    write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 2, 1.0))
    write_log(tmp_path / "run/other.jsonl", rows(1, 2, 2.0))
    write_log(tmp_path / "run/new.jsonl", {})
    (run,), problems = read_runs([tmp_path])
    assert run.name == "run" and len(problems) == 1 and "left out other.jsonl, beside attempt-1.jsonl" in problems[0]


def test_runs_of_the_same_name_are_told_apart_and_named(tmp_path):
    for folder in ("x/deep", "y/deep"):
        write_log(tmp_path / folder / "run/attempt-1.jsonl", rows(1, 2, 1.0))
    runs, problems = read_runs([tmp_path])
    assert sorted(run.name for run in runs) == ["x/deep/run", "y/deep/run"]
    assert "2 runs are called run" in problems[0]


def test_a_log_that_cannot_be_opened_is_a_line_and_costs_the_others_nothing(tmp_path):
    for name in ("ok", "run/attempt-1", "run/attempt-3"):
        write_log(tmp_path / f"{name}.jsonl", rows(1, 2, 1.0))
    write_config(tmp_path, loss="gspo")
    (tmp_path / "events").mkdir()
    links = ("gone.jsonl", "run/attempt-2.jsonl", "run/gone.jsonl", "events/events.out.tfevents.1.x")
    for name in links:
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    runs, problems = read_runs([tmp_path])
    assert sorted(run.name for run in runs) == ["ok", "run"]
    assert next(run for run in runs if run.name == "ok").settings.loss == "gspo"
    for name in links:
        assert f"{tmp_path / name}: not readable (No such file or directory)" in problems


def test_a_log_or_config_that_is_deleted_between_finding_and_reading_is_a_line(tmp_path, monkeypatch):
    write_log(tmp_path / "run/attempt-1.jsonl", rows(1, 2, 1.0))
    monkeypatch.setattr("verl_m2po.report.reading.settings.config_file", lambda folder: folder / "config.yaml")
    (source,), _ = find_sources(tmp_path)
    source.files[0].unlink()
    problems = read_run(source).problems
    assert [line.split("/")[-1].split(" (")[0] for line in problems] == [
        "attempt-1.jsonl: not readable",
        "config.yaml: not readable",
    ]


@pytest.mark.parametrize("kind", ["absent", "empty folder", "empty file"])
def test_what_is_not_there_is_a_line(tmp_path, kind):
    path = tmp_path / "run"
    if kind == "empty folder":
        path.mkdir()
    if kind == "empty file":
        write_log(path / "attempt-1.jsonl", {})
    runs, problems = read_runs([path])
    assert runs == []
    assert len(problems) == 1 and str(path) in problems[0]


def test_nan_and_infinity_become_gaps_and_are_remembered(tmp_path):
    path = write_log(
        tmp_path / "run.jsonl", {s: {"a": v} for s, v in enumerate([1.0, float("nan"), float("inf"), 2.0])}
    )
    (run,), _ = read_runs([path])
    assert run.series("a").to_dict() == {0: 1.0, 3: 2.0}
    assert run.not_finite == {"a": [1, 2]}


def test_a_config_beside_several_logs_is_nobodys(tmp_path):
    write_log(tmp_path / "one.jsonl", rows(1, 2, 1.0))
    write_config(tmp_path, loss="gspo")
    assert find_sources(tmp_path)[0][0].folder == tmp_path
    write_log(tmp_path / "two.jsonl", rows(1, 2, 1.0))
    assert [source.folder for source in find_sources(tmp_path)[0]] == [None, None]


def test_a_ledger_beside_a_log_is_no_line_and_all_event_folders_are_one(tmp_path):
    for name in ("m2po-s8", "grpo-s8"):
        write_log(tmp_path / name / "log.jsonl", {1: {"val-core/addition/acc/mean@1": 0.5}})
        (tmp_path / name / "ledger.jsonl").write_text('{"resumed_from":0}\n{"step":1,"version":0,"groups":[]}\n')
        (tmp_path / name / "tensorboard").mkdir()
        (tmp_path / name / "tensorboard" / "events.out.tfevents.1.host").write_bytes(b"")
    sources, problems = find_sources(tmp_path)
    assert len(sources) == 2
    assert len(problems) == 1 and "left out 2 folder(s) of TensorBoard events" in problems[0]


@pytest.mark.parametrize("steps", [[1, 2, 3, 2, 3, 4], [1, 1, 2, 2], [1, 2, 3, 1]])
def test_two_writers_of_one_log_are_noticed(tmp_path, steps):
    lines = [f'{{"step": {step}, "data": {{"training/global_step": {step}}}}}' for step in steps]
    (tmp_path / "attempt-1.jsonl").write_text("\n".join(lines) + "\n")
    (run,), problems = read_runs([tmp_path])
    assert list(run.frame.index) == sorted(set(steps))
    assert len(problems) == 1 and "two runs wrote to it, or one began again" in problems[0]


def test_a_step_in_several_lines_is_one_writer(tmp_path):
    lines = ['{"step": 1, "data": {"a": 1}}', '{"step": 1, "data": {"b": 2}}', '{"step": 2, "data": {"a": 1}}']
    (tmp_path / "attempt-1.jsonl").write_text("\n".join(lines) + "\n")
    assert read_runs([tmp_path])[1] == []
