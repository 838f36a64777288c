"""Laws of the study's queue."""

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import verl_m2po
from staleness_study import __main__ as study
from staleness_study import comparison_plan, long_plan, plan, prosperity_plan, replay_plan, tried_plan
from staleness_study.comparison_plan import ALTERNATIVES
from staleness_study.intervals import LEAST_SEEDS

REPOSITORY = Path(__file__).parents[2]


def every_job() -> list[plan.Job]:
    compared = comparison_plan.jobs({loss: next(iter(found), "") for loss, found in ALTERNATIVES.items()}, ["m2po"])
    tried = [job for config in tried_plan.TASKS for job in tried_plan.jobs(config)]
    others = [*long_plan.jobs(), *prosperity_plan.jobs(), *replay_plan.jobs()]
    return [*plan.jobs(), *comparison_plan.grid(), *compared, *tried, *others]


def test_runs_with_one_folder_are_the_same_but_for_their_length(tmp_path):
    """Whichever stages they are of."""
    settings = {}
    for job in every_job():
        assert settings.setdefault(job.folder(tmp_path), job.all_overrides) == job.all_overrides, job.name


def test_what_several_stages_want_is_run_once_and_as_long_as_any_of_them_wants(tmp_path):
    jobs = every_job()
    once = plan.longest(jobs)
    assert {job.folder(tmp_path) for job in once} == {job.folder(tmp_path) for job in jobs}
    assert max(Counter(job.folder(tmp_path) for job in once).values()) == 1
    lengths = {job.folder(tmp_path): job.steps for job in once}
    assert all(lengths[job.folder(tmp_path)] >= job.steps for job in jobs)


def test_with_one_seed_each_condition_is_still_there_in_its_order_and_the_claim_has_all_seeds():
    for jobs, of_the_claim in (
        (plan.jobs(), plan.is_of_the_claim),
        (long_plan.jobs(), long_plan.is_of_the_claim),
        (comparison_plan.jobs({"grpo": "clip0.8_0.8"}, ["topr"]), lambda job: False),
    ):
        few = plan.once(jobs, of_the_claim)
        assert few == [job for job in jobs if job in few] and len(few) < len(jobs)
        seeds = Counter(replace(job, seed=0) for job in few)
        assert set(seeds) == {replace(job, seed=0) for job in jobs}
        assert [job for job in jobs if of_the_claim(job)] == [job for job in few if of_the_claim(job)]
        assert all(count == 1 for condition, count in seeds.items() if not of_the_claim(condition))


def test_the_commands_leave_out_seeds_where_they_are_told_to(tmp_path, monkeypatch):
    queues = []
    monkeypatch.setattr(study, "_run", lambda jobs, *_: queues.append(jobs))
    for command in (study.run, study.long, study.prosperity):
        command(tmp_path, once=True)
        command(tmp_path)
    assert queues[0] == plan.once(plan.jobs(), plan.is_of_the_claim) and queues[1] == plan.jobs()
    assert queues[2] == plan.once(long_plan.jobs(), long_plan.is_of_the_claim) and queues[3] == long_plan.jobs()
    assert queues[4] == plan.once(prosperity_plan.jobs()) and queues[5] == prosperity_plan.jobs()


def test_make_passes_on_what_it_is_told_about_seeds():
    shown = subprocess.run(
        ["make", "-n", "study-all", "ONCE=1"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    commands = {line.split("staleness_study ")[1] for line in shown.splitlines() if "staleness_study " in line}
    assert {" ".join(command.split()) for command in commands if "--once" in command} == {
        f"{part} --once" for part in ("run", "long", "prosperity", "compare")
    }


def test_reported_seeds_are_not_those_that_chose_the_learning_rate():
    assert plan.TRIAL_SEED not in {job.seed for job in plan.jobs() if job.stage != "learning_rate"}


def test_every_age_has_as_many_seeds_of_every_method_that_is_compared_there():
    seeds = Counter((job.loss, job.staleness_updates) for job in plan.jobs() if job.stage == "staleness")
    assert seeds == {(loss, age): len(plan.SWEEP_SEEDS) for loss in plan.AGED for age in plan.AGES}
    assert len(plan.SWEEP_SEEDS) >= LEAST_SEEDS


def test_every_method_is_in_the_queue_at_the_largest_staleness():
    presets = {path.stem for path in (Path(verl_m2po.__file__).parent / "config" / "loss").glob("*.yaml")}
    seeds = Counter((job.loss, job.staleness_updates) for job in plan.jobs() if job.stage == "methods")
    assert seeds == {(loss, plan.STALEST): len(plan.FEW_SEEDS) for loss in presets}


def test_every_threshold_has_as_many_seeds_as_the_default_one():
    seeds = Counter(job.variant for job in plan.jobs() if job.stage == "threshold")
    default = [job for job in plan.jobs() if job.name.startswith(f"m2po-s{plan.STALEST}-") and job.stage == "staleness"]
    assert set(seeds.values()) == {len(default)} and len(seeds) == len(plan.THRESHOLDS)


def test_stopped_early_all_conditions_of_the_claim_have_as_many_seeds():
    first = plan.jobs()[: len(plan.CLAIM) * len(plan.SEEDS)]
    for i in range(0, len(first), 4):
        assert {(job.loss, job.staleness_updates) for job in first[i : i + 4]} == set(plan.CLAIM)
        assert len({job.seed for job in first[i : i + 4]}) == 1


def test_the_docs_say_how_many_runs_there_are():
    count = len(plan.jobs())
    assert f"all {count} runs" in (REPOSITORY / "recipes/staleness_study/README.md").read_text()
    assert f"is {count} runs" in (REPOSITORY / "docs/results.md").read_text()
