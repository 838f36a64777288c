"""Jobs of a sweep that would spoil each other are refused before the first, and one that is refused ends no other."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from verl_m2po.launch import sweep


@pytest.fixture
def callback(monkeypatch):
    monkeypatch.setattr(sweep, "_is_sweep", lambda: True)
    return sweep.SweepCallback()


@pytest.fixture(autouse=True)
def no_log_path(monkeypatch):
    monkeypatch.delenv(sweep.LOG_PATH, raising=False)


def job(name: str | None, **overrides: str) -> sweep.Job:
    return sweep.Job({key.replace("__", "."): value for key, value in overrides.items()}, name and Path("m2po", name))


def test_jobs_with_names_of_their_own_and_jobs_that_write_nothing_may_start():
    assert sweep.collision([job("grpo"), job("m2po")]) is None
    assert sweep.collision([job(None), job(None)]) is None


def test_two_jobs_of_one_name_are_refused_by_the_key_that_they_differ_in():
    jobs = [job("m2po", lr="1", loss="m2po"), job("grpo"), job("m2po", lr="2", loss="m2po")]
    message = str(sweep.collision(jobs))
    assert message.startswith(
        "trainer.experiment_name=m2po: two jobs of the sweep have this name and differ in lr only"
    )
    assert "trainer.experiment_name='<name>_${lr}'" in message


def test_one_log_for_all_jobs_is_refused(monkeypatch):
    monkeypatch.setenv(sweep.LOG_PATH, "/tmp/metrics.jsonl")
    message = str(sweep.collision([job("a"), job("b")]))
    assert message.startswith("VERL_FILE_LOGGER_PATH=/tmp/metrics.jsonl: every job ") and "Unset it" in message
    assert sweep.collision([job("a")]) is None


def test_single_runs_and_those_of_others_are_left_alone(callback, monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    verls = OmegaConf.create({"trainer": {"project_name": "verl", "experiment_name": "gsm8k", "logger": ["file"]}})
    callback.on_job_end(verls)
    monkeypatch.setattr(sweep, "_is_sweep", lambda: False)
    callback.on_job_end(OmegaConf.create({"algorithm": {"policy_loss": "m2po"}}))
    assert not ended


def test_ray_ends_with_the_job(callback, monkeypatch):
    ended = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    callback.on_job_end(OmegaConf.create({"algorithm": {"policy_loss": "m2po"}}))
    assert ended == [True]


def test_another_launcher_is_left_in_place(callback):
    joblib = OmegaConf.create({"hydra": {"launcher": {"_target_": "hydra_plugins.joblib.JoblibLauncher"}}})
    callback.on_multirun_start(joblib)
    assert joblib.hydra.launcher._target_ == "hydra_plugins.joblib.JoblibLauncher"


@pytest.mark.parametrize("name", ["m2po_s0", "a(b)=é", "a,b"])
def test_a_name_with_the_seed_is_read_as_it_was(monkeypatch, name):
    config = OmegaConf.create({"algorithm": {"policy_loss": "m2po"}, "trainer": {"experiment_name": name}})
    launcher = sweep.SweepLauncher()
    monkeypatch.setattr(launcher, "_config_of", lambda _overrides: config)
    *_, named = launcher._named(["data.seed=2"])
    assert OverridesParser.create().parse_override(named).value() == f"{name}_seed2"


MAIN = """
import hydra, verl
@hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)
def main(config):
    with open("trained", "a") as trained:
        print(config.trainer.experiment_name, file=trained)
main()
"""
OURS = ("--config-name=m2po_trainer", "trainer.device=npu", "model=tiny", "data.train_max_samples=-1")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny, addition):
    """Runs a sweep of a main that writes the names of its jobs, as a process; returns it and those names."""

    def run(*overrides: str):
        folder = tmp_path_factory.mktemp("sweep")
        (folder / "main.py").write_text(MAIN)
        data = [f"data.{kind}_files={addition / name}.parquet" for kind, name in (("train", "train"), ("val", "train"))]
        arguments = [*OURS, f"actor_rollout_ref.model.path={tiny}", "data.train_batch_size=8", *data]
        arguments += ["actor_rollout_ref.actor.ppo_mini_batch_size=8", *overrides]
        command = [sys.executable, "main.py", *arguments, "-m"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
        trained = folder / "trained"
        return done, trained.read_text().split() if trained.exists() else []

    return run


@pytest.mark.slow
def test_a_sweep_over_seeds_has_names_with_the_seed(swept):
    done, trained = swept("data.seed=1,2")
    assert done.returncode == 0, done.stderr
    assert trained == ["m2po_sync_s0_seed1", "m2po_sync_s0_seed2"]


@pytest.mark.slow
def test_names_are_looked_at_before_the_first_job_and_no_log_is_renamed(swept):
    done, trained = swept("actor_rollout_ref.actor.optim.lr=1e-5,1e-6")
    assert done.returncode == 1 and trained == []
    assert "differ in actor_rollout_ref.actor.optim.lr only" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_job_that_is_refused_is_left_out_and_the_others_run(swept):
    name = "trainer.experiment_name='length_${data.max_prompt_length}'"
    done, trained = swept("data.max_prompt_length=8,-8,16", name)
    assert trained == ["length_8", "length_16"]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "data.max_prompt_length=-8" in done.stderr and "has refused these jobs of the sweep" in done.stderr
