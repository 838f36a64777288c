"""The study's driver on two short runs, one of which cannot work."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from staleness_study import run as driver
from staleness_study.plan import Job
from staleness_study.run import config_hash, is_done, run_jobs
from verl_m2po.report.reading.runs import read_runs

JOB = Job("staleness", "m2po", 8, 1, steps=2)
SHORT = ("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=2")


@pytest.fixture
def finished(tmp_path):
    """A job, and the record that it left, which can be replaced."""
    job = JOB
    job.folder(tmp_path).mkdir(parents=True)
    (job.folder(tmp_path) / driver.LOG).write_text('{"step": 2}\n')

    def record(**changes):
        fields = {"overrides": job.all_overrides} | driver.provenance(job) | changes
        known = {key: value for key, value in fields.items() if value is not None}
        (job.folder(tmp_path) / driver.RECORD).write_text(json.dumps(known))
        return is_done(job, tmp_path)

    return record


def test_a_run_of_other_versions_model_or_config_is_not_finished(finished):
    assert finished()
    assert not finished(versions=driver.provenance(JOB)["versions"] | {"torch": "1.0"})
    assert not finished(model=driver.provenance(JOB)["model"] | {"layers": 7})
    assert not finished(config_files="another")
    assert finished(config_files=None), "runs before the hash was recorded"


def test_hash_of_the_config_files_is_that_of_what_they_set(tmp_path):
    (tmp_path / "loss").mkdir()
    hashes = []
    for text in ("lr: 1\n", "# Why\nlr: 1\n", "lr: 2\n"):
        (tmp_path / "loss" / "m2po.yaml").write_text(text)
        config_hash.cache_clear()
        hashes.append(config_hash(tmp_path, ("loss=m2po",)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_an_option_that_a_run_does_not_choose_is_not_in_its_hash(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "base.yaml").write_text("lr: 1\n")
    for name in ("m2po", "grpo"):
        (tmp_path / "loss" / f"{name}.yaml").write_text(f"loss_mode: {name}\n")
    hashes = {option: config_hash(tmp_path, (f"loss={option}",)) for option in ("m2po", "grpo")}
    assert hashes["m2po"] != hashes["grpo"]
    (tmp_path / "loss" / "grpo.yaml").write_text("loss_mode: another\n")
    config_hash.cache_clear()
    assert config_hash(tmp_path, ("loss=m2po",)) == hashes["m2po"]
    assert config_hash(tmp_path, ("loss=grpo",)) != hashes["grpo"]


@pytest.mark.slow
def test_runs_what_is_missing_and_names_what_failed(tmp_path, capsys):
    good = Job("staleness", "m2po", 8, 1, SHORT, steps=3)
    bad = Job("staleness", "m2po", 8, 2, (*SHORT, "actor_rollout_ref.rollout.top_p=0.9"), steps=3)
    failed = run_jobs([good, bad], tmp_path, 1, Console())
    assert [line.split(":")[0] for line in failed] == [bad.name]
    assert is_done(good, tmp_path) and not is_done(bad, tmp_path)
    assert is_done(replace(good, steps=1), tmp_path)
    assert not is_done(replace(good, steps=4), tmp_path)

    record = json.loads((good.folder(tmp_path) / "run.json").read_text())
    assert record["overrides"] == good.all_overrides
    assert {"verl", "torch", "verl-m2po"} <= record["versions"].keys()
    (run,), problems = read_runs([good.folder(tmp_path)])
    assert not problems
    assert run.frame.index.tolist() == [0, 1, 2, 3]
    assert (run.settings.loss, run.settings.staleness_updates, run.settings.seed) == ("m2po", 8, 1)
    assert {"val-core/arithmetic/acc/mean@1", "actor/m2po/masked_fraction", "staleness/age_updates_mean"} <= run.logged

    before = (good.folder(tmp_path) / "attempt-1.jsonl").stat().st_mtime_ns
    assert run_jobs([good], tmp_path, 1, Console()) == []
    assert (good.folder(tmp_path) / "attempt-1.jsonl").stat().st_mtime_ns == before
