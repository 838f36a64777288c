"""Jobs of a sweep that would spoil each other are refused, and each leaves verl's Ray behind."""

from pathlib import Path

import pytest
import ray
from omegaconf import OmegaConf

from verl_m2po.launch import sweep


@pytest.fixture
def callback(monkeypatch):
    monkeypatch.setattr(sweep, "_is_sweep", lambda: True)
    monkeypatch.delenv(sweep.LOG_PATH, raising=False)
    return sweep.SweepCallback()


def job(name: str, **trainer):
    names = {"project_name": "m2po", "experiment_name": name}
    return OmegaConf.create({"algorithm": {"policy_loss": "m2po"}, "trainer": {**names, "logger": ["file"], **trainer}})


def test_jobs_with_names_of_their_own_may_start(callback):
    callback.on_job_start(job("grpo"))
    callback.on_job_start(job("m2po"))


def test_a_second_job_of_the_same_name_is_refused(callback):
    callback.on_job_start(job("m2po"))
    with pytest.raises(SystemExit, match=r"trainer\.experiment_name=m2po: an earlier job .* checkpoints\. Put what is"):
        callback.on_job_start(job("m2po"))


def test_checkpoints_of_the_same_name_are_refused_without_a_log_too(callback):
    callback.on_job_start(job("m2po", logger=["console"], save_freq=2))
    with pytest.raises(SystemExit, match="checkpoints"):
        callback.on_job_start(job("m2po", logger=["console"], save_freq=2))


def test_jobs_that_write_nothing_may_have_one_name(callback):
    for _ in range(2):
        callback.on_job_start(job("m2po", logger=["console"], save_freq=-1))


def test_one_log_for_all_jobs_is_refused(callback, monkeypatch):
    monkeypatch.setenv(sweep.LOG_PATH, "/tmp/metrics.jsonl")
    with pytest.raises(SystemExit, match=r"VERL_FILE_LOGGER_PATH=/tmp/metrics\.jsonl: every job .* Unset it"):
        callback.on_job_start(job("m2po"))


def test_single_runs_and_those_of_others_are_left_alone(callback, monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    verls = OmegaConf.create({"trainer": {"project_name": "verl", "experiment_name": "gsm8k", "logger": ["file"]}})
    for _ in range(2):
        callback.on_job_start(verls)
        callback.on_job_end(verls)
    monkeypatch.setattr(sweep, "_is_sweep", lambda: False)
    for _ in range(2):
        callback.on_job_start(job("m2po"))
        callback.on_job_end(job("m2po"))
    assert not ended


def test_ray_ends_with_the_job(callback, monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    callback.on_job_end(job("m2po"))
    assert ended == [True]


def test_the_first_job_may_have_any_folder():
    assert sweep.problem_of(Path("m2po/a"), {Path("m2po/b")}) is None
