import builtins
import os
import re

import pytest
import typer
from report_logs import stale_run, write_config, write_log
from typer.testing import CliRunner

from verl_m2po.report import command


@pytest.fixture
def app():
    app = typer.Typer()
    app.command()(command.report)
    app.command()(command.dashboard)
    return app


def invoke(app, *arguments):
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))
    return result.exit_code, re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", result.output))


@pytest.fixture
def run(tmp_path):
    write_log(tmp_path / "runs/m2po-s256/attempt-1.jsonl", stale_run("m2po", 64, seed=1, steps=20))
    return tmp_path / "runs/m2po-s256"


def test_one_run_gives_table_page_and_places(app, run, tmp_path):
    code, output = invoke(app, "report", run, "--out", tmp_path / "out", "--target", 0.4)
    assert code == 0
    assert "m2po, s=256" in output and "steps to 0.4" in output and "report.html" in output
    assert (tmp_path / "out/report.html").exists() and (tmp_path / "out/report.md").exists()


def test_nothing_at_all_is_an_exit_status(app, tmp_path):
    code, output = invoke(app, "report", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == 1 and "nowhere: not there" in output


def test_what_is_there_is_shown_although_something_is_not(app, run, tmp_path):
    code, output = invoke(app, "report", run, tmp_path / "nowhere", "--out", tmp_path / "out", "--no-figures")
    assert code == 0 and "nowhere: not there" in output and "m2po, s=256" in output


def test_without_matplotlib_the_error_names_the_extra_and_the_table_still_works(app, run, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    code, output = invoke(app, "report", run, "--out", tmp_path / "out")
    assert code == 2 and "verl-m2po[report]" in output
    code, output = invoke(app, "report", run, "--out", tmp_path / "out", "--no-figures")
    assert code == 0 and "m2po, s=256" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]


@pytest.mark.parametrize("target", ["nan", "inf", "x"])
def test_a_target_that_is_not_a_number_is_refused(app, run, target):
    code, output = invoke(app, "report", run, "--target", target)
    assert code == 2 and "--target" in output


def test_an_out_that_is_a_file_is_refused(app, run, tmp_path):
    (tmp_path / "out").write_text("mine")
    code, output = invoke(app, "report", run, "--out", tmp_path / "out")
    assert code == 2 and "is no folder: choose another" in output
    code, output = invoke(app, "report", run, "--out", tmp_path / "out" / "sub" / "folder")
    assert code == 2 and f"lies below {tmp_path / 'out'}, which is no folder" in output
    assert (tmp_path / "out").read_text() == "mine"


def test_a_fifo_that_is_named_like_a_log_is_not_waited_for(app, run, tmp_path):
    os.mkfifo(tmp_path / "runs" / "metrics.jsonl")
    code, output = invoke(app, "report", tmp_path / "runs", "--out", tmp_path / "out", "--no-figures")
    assert code == 0 and "metrics.jsonl: no regular file" in output and "m2po, s=256" in output
    code, output = invoke(app, "report", tmp_path / "runs" / "metrics.jsonl", "--out", tmp_path / "out", "--no-figures")
    assert code == 1 and "neither a file nor a folder" in output


def test_watch_reports_again_only_when_a_log_grew(app, run, tmp_path, monkeypatch):
    """The clock is the test's: each sleep is one look at the logs."""
    write_log(run / "attempt-1.jsonl", {1: {"critic/score/mean": 0.5}})
    looks = iter(["nothing", "grow", "stop"])

    def sleep(seconds):
        action = next(looks)
        if action == "grow":
            write_log(run / "attempt-1.jsonl", {1: {"critic/score/mean": 0.5}, 2: {"critic/score/mean": 0.6}})
        if action == "stop":
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    code, output = invoke(app, "report", run, "--out", tmp_path / "out", "--watch", "--interval-s", 7)
    assert code == 0
    assert output.count("report.html") == 2
    assert 'http-equiv="refresh" content="7"' in (tmp_path / "out/report.html").read_text()


def test_watch_sees_a_config_and_survives_a_log_that_is_deleted(app, run, tmp_path, monkeypatch):
    log = write_log(run / "attempt-1.jsonl", {1: {"critic/score/mean": 0.5}})
    looks = iter(["config", "delete", "stop"])

    def sleep(seconds):
        action = next(looks)
        if action == "config":
            write_config(run, loss="gspo", staleness_updates=8)
        if action == "delete":
            log.unlink()
            log.symlink_to(tmp_path / "nowhere")
        if action == "stop":
            raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", sleep)
    code, output = invoke(app, "report", run, "--out", tmp_path / "out", "--watch", "--no-figures")
    assert code == 0 and output.count("written:") == 3
    assert "gspo, s=8" in output and "not readable" in output


def test_a_log_that_vanishes_while_it_is_looked_at_has_a_state(tmp_path):
    assert command._state(tmp_path / "gone") == (str(tmp_path / "gone"),)


def test_watch_waits_for_a_run_that_has_not_started(app, tmp_path, monkeypatch):
    def sleep(seconds):
        if (tmp_path / "run").exists():
            raise KeyboardInterrupt
        write_log(tmp_path / "run/attempt-1.jsonl", {1: {"critic/score/mean": 0.5}})

    monkeypatch.setattr(command.time, "sleep", sleep)
    code, output = invoke(app, "report", tmp_path / "run", "--out", tmp_path / "out", "--watch")
    assert code == 0 and "not there" in output and "0.500" in output


def test_dashboard_command(app, tmp_path):
    code, output = invoke(app, "dashboard", tmp_path / "tb")
    assert code == 0 and "written:" in output
