"""A run that fails starts again by itself: as often as allowed, never in a loop, and never after Ctrl-C."""

import json
import subprocess
import sys

import pytest
from compose import composed
from hydra.core.utils import JobReturn, JobStatus
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_m2po.launch import again, failure
from verl_m2po.launch.callback import PreflightCallback
from verl_m2po.launch.checks import restarts
from verl_m2po.staleness.watch import stop

STALE = ("staleness=s16", "trainer.save_freq=2", "trainer.resume_mode=auto")
KEY = "trainer.v1.stale_k.restarts"


@given(st.integers(0, 8), st.lists(st.integers(0, 4), max_size=40))
def test_never_more_restarts_than_allowed_nor_three_at_one_step(allowed, fails_at):
    attempts = again.Attempts()
    for step in fails_at:
        if attempts.why_not(allowed, step) is not None:
            break
        attempts = attempts.after(step)
    assert len(attempts.failed_at) <= allowed
    for three in zip(*(attempts.failed_at[start:] for start in range(3)), strict=False):
        assert len(set(three)) > 1
    stayed = len(fails_at) > len(attempts.failed_at)
    if stayed and len(attempts.failed_at) < allowed:
        step = fails_at[len(attempts.failed_at)]
        assert attempts.failed_at[-2:] == (step, step), "it ended although it made progress"


def test_attempts_outlive_the_process_that_counts_them():
    attempts = again.Attempts().after(3).after(7)
    assert again.Attempts.read({again.VARIABLE: json.dumps(attempts.failed_at)}) == attempts
    assert again.Attempts.read({}) == again.Attempts()


def test_a_step_that_fails_again_and_again_is_named():
    attempts = again.Attempts((5, 9, 9))
    assert "2 times at trainer step 9" in attempts.why_not(10, 9)
    assert attempts.why_not(10, 11) is None
    assert "restarts=3 allows" in attempts.why_not(3, 11)


class Listener:
    """Closes Ray, as far as the callback can tell."""

    def __init__(self, received=None):
        self.received, self.is_stopped = received, False

    def stop(self, tell_status):
        self.is_stopped = True


@pytest.fixture
def fail(monkeypatch, capsys):
    """Ends a job with an error; returns the attempts with which its command started again, None if it did not."""

    def run(*overrides, step=4, before=(), received=None):
        started = []
        monkeypatch.setattr(stop, "get", lambda what: step or None)
        monkeypatch.setenv(again.VARIABLE, json.dumps(before))
        listener = Listener(received)

        def start_again(_config, attempts):
            assert listener.is_stopped, "Ray is still there"
            started.append(attempts.failed_at)

        monkeypatch.setattr(again, "start_again", start_again)
        monkeypatch.setattr(failure.atexit, "register", lambda _: None)
        callback = PreflightCallback()
        callback._config, callback._listener = composed(*STALE, *overrides), listener
        ended = JobReturn(status=JobStatus.FAILED)
        ended.return_value = RuntimeError("the actor worker died")
        callback.on_job_end(ended)
        failure._reports.clear()
        return started[0] if started else None

    return run


def test_it_starts_again_and_says_why(fail, capsys):
    assert fail(f"{KEY}=2") == (4,)
    assert "RuntimeError: the actor worker died" in capsys.readouterr().err
    assert fail(f"{KEY}=2", before=[4]) == (4, 4)


@pytest.mark.parametrize(
    ("overrides", "situation"),
    [
        ((), {}),
        ((f"{KEY}=2",), {"before": [1, 2]}),
        ((f"{KEY}=9",), {"before": [4, 4]}),
        ((f"{KEY}=2",), {"received": 2}),
        ((f"{KEY}=2",), {"step": 0}),
    ],
    ids=["not asked to", "used up", "no progress", "Ctrl-C", "never trained"],
)
def test_it_ends(fail, overrides, situation):
    assert fail(*overrides, **situation) is None


def test_ray_is_closed_even_if_what_is_known_of_the_attempts_cannot_be_read(monkeypatch):
    monkeypatch.setattr(stop, "get", lambda what: 4)
    monkeypatch.setenv(again.VARIABLE, "no JSON")
    callback, listener = PreflightCallback(), Listener()
    callback._config, callback._listener = composed(*STALE, f"{KEY}=2"), listener
    with pytest.raises(json.JSONDecodeError):
        callback.on_job_end(JobReturn(status=JobStatus.FAILED))
    assert listener.is_stopped


def test_a_store_that_is_gone_leaves_the_last_checkpoint(monkeypatch, tmp_path):
    def gone(_what):
        raise ConnectionError("the store is gone")

    monkeypatch.setattr(stop, "get", gone)
    config = composed(*STALE, f"trainer.default_local_dir={tmp_path}")
    assert again.failed_step(config) == 0
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    assert again.failed_step(config) == 6


def test_the_command_is_the_same_in_the_same_process(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\n"
        "from omegaconf import OmegaConf\n"
        "from verl_m2po.launch.again import Attempts, start_again\n"
        "attempts = Attempts.read()\n"
        "print(os.getpid(), sys.argv[1:], attempts.failed_at)\n"
        "if len(attempts.failed_at) < 2:\n"
        "    start_again(OmegaConf.create({'hydra': {'runtime': {'cwd': os.getcwd()}}}), attempts.after(7))\n"
    )
    lines = subprocess.run(
        [sys.executable, str(script), "a=b c"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len({line.split()[0] for line in lines}) == 1
    assert [line.split(" ", 1)[1] for line in lines] == [
        "['a=b c'] ()",
        "['a=b c'] (7,)",
        "['a=b c'] (7, 7)",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("trainer.resume_mode=disable",), "Set trainer.resume_mode=auto"),
        (("trainer.save_freq=-1",), "Set trainer.save_freq"),
    ],
)
def test_restarts_that_go_on_from_nothing_are_refused(overrides, said):
    (problem,) = restarts.problems(composed(*STALE, f"{KEY}=1", *overrides))
    assert problem.key == KEY and problem.is_fatal and said in problem.remedy
    assert not list(restarts.problems(composed(*STALE, f"{KEY}=1")))
    assert not list(restarts.problems(composed(*STALE, *overrides)))


def test_a_sweep_is_not_restarted():
    config = OmegaConf.merge({"hydra": {"mode": "MULTIRUN"}}, composed(*STALE, f"{KEY}=1"))
    (problem,) = restarts.problems(config)
    assert "sweep" in problem.why
