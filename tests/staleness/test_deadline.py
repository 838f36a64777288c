"""What takes too long ends, and says who does not answer and what went wrong first."""

import os
import time

import pytest

from verl_m2po.staleness.config import StaleKConfig
from verl_m2po.staleness.watch import deadline
from verl_m2po.staleness.watch.deadline import LogsSince, TimeLimits, time_limit
from verl_m2po.staleness.watch.liveness import Watch, WorkerDied

KEY = "trainer.v1.stale_k.push_timeout_s"
ERROR = "AttributeError: 'QKVParallelLinear' object has no attribute 'base_layer'"


class TwoProcesses(Watch):
    """One that answers, and one that waits on a socket."""

    def find_silent(self, timeout_s):
        return ["rollout worker 1 of 2"]


@pytest.fixture
def watch():
    return TwoProcesses(ask_every_s=3600, exit_s=None)


@pytest.fixture
def logs(tmp_path, monkeypatch):
    (tmp_path / "worker-a.err").write_text("ValueError: before the block\n")
    monkeypatch.setattr(deadline, "_logs_folder", lambda: tmp_path)
    return tmp_path


def log(file, text, age_s):
    with file.open("a") as stream:
        stream.write(text)
    then = time.time() - age_s
    os.utime(file, (then, then))


def test_a_hanging_block_ends_with_the_silent_process_and_the_first_error(watch, logs):
    began = time.monotonic()
    with (
        pytest.raises(WorkerDied) as died,
        watch.guard(),
        time_limit(watch, 0.3, KEY, "the push of weight version 4"),
    ):
        log(logs / "worker-a.err", f"(EngineCore pid=7) ERROR [core.py:1] {ERROR}\nRuntimeError: later\n", age_s=20)
        log(logs / "worker-b.err", "RuntimeError: gloo: connection closed by peer\n", age_s=10)
        time.sleep(60)
    assert time.monotonic() - began < 30
    said = str(died.value)
    assert f"the push of weight version 4 takes longer than {KEY}=0.3 seconds" in said
    assert "No answer from: rollout worker 1 of 2." in said
    assert ERROR in said and "worker-a.err" in said and "later" not in said and "gloo" not in said


def test_a_block_in_time_is_left_alone(watch, logs):
    with watch.guard():
        with time_limit(watch, 0.2, KEY, "a push"):
            pass
        time.sleep(0.5)


def test_a_block_that_ends_while_others_are_asked_is_left_alone(watch, logs, monkeypatch):
    monkeypatch.setattr(watch, "find_silent", lambda timeout_s: time.sleep(0.4) or [])
    with watch.guard():
        with time_limit(watch, 0.1, KEY, "a push"):
            time.sleep(0.3)
        time.sleep(0.4)


def test_null_waits_for_ever(watch, monkeypatch):
    monkeypatch.setattr(deadline.threading, "Timer", lambda *_: pytest.fail("there is a limit"))
    with time_limit(watch, None, KEY, "a push"):
        pass


def test_the_settings_of_the_mode_are_the_limits(watch, logs):
    limits = TimeLimits(watch, "stale_k", StaleKConfig(start_timeout_s=None, push_timeout_s=0.2))
    with (
        pytest.raises(
            WorkerDied, match=r"weight version 7 takes longer than trainer\.v1\.stale_k\.push_timeout_s=0\.2"
        ),
        watch.guard(),
        limits.start(),
        limits.push(7),
    ):
        time.sleep(60)


def test_without_an_error_in_a_log_it_says_where_to_look(logs):
    assert LogsSince(logs).first_error() is None
    assert str(logs) in deadline._said([], LogsSince(logs))
    assert LogsSince(None).first_error() is None


@pytest.mark.ray
def test_the_silent_are_those_that_wait_on_something_else(cluster, tmp_path):
    @cluster.remote(num_cpus=0)
    class Process:
        async def push(self):
            (tmp_path / "begun").touch()
            time.sleep(3600)  # as verl's sender does, in its event loop

    answers, waits = Process.remote(), Process.remote()
    cluster.get([answers.__ray_ready__.remote(), waits.__ray_ready__.remote()])
    waits.push.remote()
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    watch = Watch()
    watch.add("rollout worker", [answers, waits])
    assert watch.find_silent(3.0) == ["rollout worker 1 of 2"]
    assert deadline._logs_folder().is_dir()
