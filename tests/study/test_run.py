"""The study's driver on two short runs, one of which cannot work."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from verl_m2po.report.runs import read_runs
from verl_m2po.study.plan import Job
from verl_m2po.study.run import is_done, run_jobs

pytestmark = pytest.mark.slow

SHORT = ("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=2")


def test_runs_what_is_missing_and_names_what_failed(tmp_path, capsys):
    good = Job("staleness", "m2po", 8, 1, SHORT, steps=2)
    bad = Job("staleness", "m2po", 8, 2, (*SHORT, "actor_rollout_ref.rollout.top_p=0.9"), steps=2)
    failed = run_jobs([good, bad], tmp_path, 1, Console())
    assert [line.split(":")[0] for line in failed] == [bad.name]
    assert is_done(good, tmp_path) and not is_done(bad, tmp_path)
    assert is_done(replace(good, steps=1), tmp_path)
    assert not is_done(replace(good, steps=3), tmp_path)

    record = json.loads((good.folder(tmp_path) / "run.json").read_text())
    assert record["overrides"] == good.all_overrides
    assert {"verl", "torch", "verl-m2po"} <= record["versions"].keys()
    (run,), problems = read_runs([good.folder(tmp_path)])
    assert not problems
    assert run.frame.index.tolist() == [0, 1, 2]
    assert (run.settings.loss, run.settings.staleness_updates, run.settings.seed) == ("m2po", 8, 1)
    assert {"val-core/arithmetic/acc/mean@1", "actor/m2po/masked_fraction", "staleness/age_updates_mean"} <= run.logged

    before = (good.folder(tmp_path) / "attempt-1.jsonl").stat().st_mtime_ns
    assert run_jobs([good], tmp_path, 1, Console()) == []
    assert (good.folder(tmp_path) / "attempt-1.jsonl").stat().st_mtime_ns == before
