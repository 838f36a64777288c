"""The study's stage `replay`: its queue, and what its table makes of the runs."""

from collections import Counter

import pytest

from staleness_study import replay_page, replay_plan
from staleness_study.plan import SEEDS
from staleness_study.results import PROMPTS, Result, load, write


def result(loss: str, variant: str, window: int, seed: int, accuracy: list[float], prompts: float) -> Result:
    """A run with a validation every 25 trainer steps, and as many prompts in each of them."""
    steps = [25 * i for i in range(len(accuracy))]
    curves = {PROMPTS: [prompts * step for step in steps[1:]]}
    return Result(replay_plan.STAGE, loss, window, 4, seed, variant, steps, accuracy, curves, 60.0)


def test_every_run_has_its_own_folder_and_the_most_telling_ones_come_first(tmp_path):
    jobs = replay_plan.jobs()
    assert max(Counter(job.folder(tmp_path) for job in jobs).values()) == 1
    assert [job.name for job in jobs[:3]] == ["grpo-s0-seed1", "m2po-x4-s256-seed1", "grpo-x4-s256-seed1"]
    seeds = Counter(replay_plan.job(condition, 0).name for condition in replay_plan.conditions() for _ in SEEDS)
    assert sum(seeds.values()) == len(jobs)


def test_an_epoch_is_a_use_so_every_run_makes_as_many_updates():
    """Four updates a trainer step, times the epochs."""
    for condition in replay_plan.conditions():
        job = replay_plan.job(condition, 1)
        assert job.steps * (4 if "epochs" in job.variant else 1) == 1000


def test_accuracy_after_prompts_is_of_the_validations_until_then():
    run = result("grpo", "", 0, 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], prompts=32)
    assert replay_page.accuracy_after(run, 32 * 50) == pytest.approx(0.45)
    assert replay_page.accuracy_after(run, 32 * 125) == pytest.approx(0.65)
    assert replay_page.accuracy_after(run, 32 * 10) is None, "none was validated by then"
    assert replay_page.accuracy_after(run, 32 * 126) is None, "not as many were generated"


def test_the_table_compares_with_on_policy_training_after_as_many_prompts(tmp_path):
    runs = [
        result("grpo", "", 0, 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], prompts=32),
        result("m2po", "x4", 256, 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.7], prompts=8),
    ]
    common = {"config": "c", "model": {}, "versions": {"verl": "0"}, "machine": "a machine"}
    write(common | {"runs": [vars(run) for run in runs]}, tmp_path / "replay.json")
    data, loaded = load(tmp_path / "replay.json")
    page = tmp_path / "page.md"
    page.write_text("<!-- replay results: begin -->\n<!-- replay results: end -->\n")
    replay_page.write(data, loaded, page)
    written = page.read_text()
    assert "| M2PO, 4 uses, window 256 updates | 1 | 500 | 1,000 | 0.625 | 0.400 |" in written
    assert "against on-policy GRPO: -2.5 points (1 seed)" in written
