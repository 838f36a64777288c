"""Laws of the study's queue."""

from collections import Counter
from pathlib import Path

import verl_m2po
from staleness_study import plan


def test_every_run_has_its_own_folder(tmp_path):
    folders = Counter(job.folder(tmp_path) for job in plan.jobs())
    assert max(folders.values()) == 1


def test_reported_seeds_are_not_those_that_chose_the_learning_rate():
    assert plan.TRIAL_SEED not in {job.seed for job in plan.jobs() if job.stage != "learning_rate"}


def test_five_seeds_on_policy_and_at_the_largest_staleness():
    seeds = Counter((job.loss, job.staleness_updates) for job in plan.jobs() if job.stage == "staleness")
    for loss in plan.METHODS:
        assert seeds[loss, 0] == seeds[loss, plan.STALEST] == len(plan.SEEDS) >= 5


def test_every_method_is_in_the_queue_on_policy_and_at_the_largest_staleness():
    presets = {path.stem for path in (Path(verl_m2po.__file__).parent / "config" / "loss").glob("*.yaml")}
    jobs = [job for job in plan.jobs() if job.stage in ("staleness", "methods")]
    seeds = Counter((job.loss, job.staleness_updates) for job in jobs)
    for loss in presets:
        assert seeds[loss, 0] == seeds[loss, plan.STALEST] == len(plan.SEEDS), loss
    assert {loss for loss, _ in seeds} == presets


def test_every_threshold_has_as_many_seeds_as_the_default_one():
    seeds = Counter(job.variant for job in plan.jobs() if job.stage == "threshold")
    assert set(seeds.values()) == {len(plan.SEEDS)} and len(seeds) == len(plan.THRESHOLDS)


def test_stopped_early_all_conditions_of_the_claim_have_as_many_seeds():
    first = plan.jobs()[: len(plan.CLAIM) * len(plan.SEEDS)]
    for i in range(0, len(first), 4):
        assert {(job.loss, job.staleness_updates) for job in first[i : i + 4]} == set(plan.CLAIM)
        assert len({job.seed for job in first[i : i + 4]}) == 1


def test_the_docs_say_how_many_runs_there_are():
    root = Path(__file__).parents[2]
    count = len(plan.jobs())
    assert f"all {count} runs" in (root / "recipes/staleness_study/README.md").read_text()
    assert f"is {count} runs" in (root / "docs/results.md").read_text()
