"""The study's comparison: its grid, what is taken of it, its tables."""

from collections import Counter
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from staleness_study import __main__ as study
from staleness_study import collect, comparison_page, comparison_plan, plan, results, rivals
from staleness_study.comparison_plan import AGES_STAGE, ALTERNATIVES, GRID, HOT_STAGE, STAGE
from staleness_study.results import Result
from staleness_study.run import CONFIG_FILES
from staleness_study.step_times import StepTimes
from verl_m2po.one_process import setup as setups


def result(stage: str, loss: str, updates: int, seed: int, variant: str = "", last: float = 0.4) -> Result:
    curves = {name: [0.01, 0.01] for name in collect.CURVES}
    return Result(stage, loss, updates, 4, seed, variant, [0, 100, 200], [0.34, last, last], curves, 60.0)


def whole_grid(best: dict[str, str]) -> list[Result]:
    return [
        result(
            GRID,
            job.loss,
            job.staleness_updates,
            job.seed,
            job.variant,
            0.5 if best.get(job.loss) == job.variant else 0.4,
        )
        for job in comparison_plan.grid()
    ]


def test_what_shares_a_folder_is_the_same_run(tmp_path):
    """If shorter."""
    jobs = [*comparison_plan.grid(), *comparison_plan.jobs({"m2po": "threshold0.16", "grpo": ""})]
    made = {(job.folder(tmp_path), tuple(job.all_overrides)) for job in jobs}
    assert max(Counter(folder for folder, _ in made).values()) == 1


def test_the_grid_has_a_seed_of_its_own_and_the_comparison_the_reported_ones():
    assert {job.seed for job in comparison_plan.grid()} == {plan.TRIAL_SEED}
    jobs = [job for job in comparison_plan.jobs({}) if job.stage in (STAGE, AGES_STAGE)]
    seeds = Counter((job.stage, job.loss, job.staleness_updates) for job in jobs)
    assert all(
        count == len(plan.SWEEP_SEEDS if stage == AGES_STAGE else plan.SEEDS) for (stage, *_), count in seeds.items()
    )
    stalest = {(STAGE, loss, plan.STALEST) for loss in ALTERNATIVES}
    younger = {(AGES_STAGE, loss, age) for loss in ALTERNATIVES for age in (0, 64)}
    on_policy = {(STAGE, loss, 0) for loss in comparison_plan.ON_POLICY}
    assert set(seeds) == on_policy | stalest | younger


def test_the_best_methods_learn_from_data_older_than_any_preset():
    best = ("topr", "m2po")
    oldest = [job for job in comparison_plan.jobs({}, best) if job.staleness_updates == comparison_plan.OLDEST]
    ran = Counter((job.loss, job.variant) for job in oldest)
    assert ran == dict.fromkeys((("topr", ""), ("m2po", ""), ("m2po", "threshold0.16")), len(plan.FEW_SEEDS))
    setup = setups.read(oldest[0].all_overrides, oldest[0].config)
    assert setup.config.trainer.v1.stale_k.staleness_updates == comparison_plan.OLDEST


def test_every_method_is_tried_at_ten_times_the_learning_rate():
    hot = [job for job in comparison_plan.jobs({}) if job.stage == HOT_STAGE]
    assert Counter(job.loss for job in hot) == dict.fromkeys(ALTERNATIVES, len(plan.SWEEP_SEEDS))
    setup = setups.read(hot[0].all_overrides, hot[0].config)
    assert setup.actor.optim.lr == pytest.approx(10 * setups.read([], plan.ARITHMETIC).actor.optim.lr)


def test_the_best_methods_are_known_once_all_have_as_many_seeds():
    worst_first = enumerate(reversed(ALTERNATIVES))
    runs = [result(STAGE, loss, plan.STALEST, 1, last=0.4 + place / 100) for place, loss in worst_first]
    assert comparison_page.best_methods(runs) == list(ALTERNATIVES)[: comparison_plan.AT_OLDEST]
    assert comparison_page.best_methods([*runs, result(STAGE, "m2po", plan.STALEST, 2)]) == []
    assert comparison_page.best_methods([]) == []


def test_methods_and_settings_are_those_of_the_config():
    options = {path.stem for path in (CONFIG_FILES / "loss").glob("*.yaml")}
    assert set(ALTERNATIVES) <= options
    config = setups.read([], plan.ARITHMETIC).config
    for job in comparison_plan.grid():
        for override in job.overrides:
            key = override.partition("=")[0]
            assert OmegaConf.select(config, key, default="absent") != "absent", override


def test_what_is_best_of_a_whole_grid_is_taken_and_run_on_the_stalest_data():
    chosen = rivals.best_settings(whole_grid({"m2po": "threshold0.16", "grpo": ""}))
    assert (chosen["m2po"], chosen["grpo"]) == ("threshold0.16", "")
    jobs = [job for job in comparison_plan.jobs(chosen) if job.stage == STAGE]
    runs = [job for job in jobs if job.variant and job.loss in ("m2po", "grpo")]
    assert {(job.loss, job.staleness_updates, job.overrides) for job in runs} == {
        ("m2po", plan.STALEST, ALTERNATIVES["m2po"]["threshold0.16"])
    }


def test_of_a_grid_that_is_not_whole_nothing_is_taken():
    partial = [run for run in whole_grid({}) if (run.loss, run.variant) != ("m2po", "threshold0.64")]
    chosen = rivals.best_settings(partial)
    assert "m2po" not in chosen and "grpo" in chosen


def test_the_tables_have_what_ran(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- grid: begin -->\n<!-- grid: end -->\n<!-- comparison: begin -->\n<!-- comparison: end -->\n")
    grid = whole_grid({"m2po": "threshold0.16", "grpo": ""})
    seeds = (1, 2, 3)
    runs = [
        *(result(STAGE, "grpo", 0, seed, last=0.5 + seed / 1000) for seed in seeds),
        *(result(STAGE, "grpo", plan.STALEST, seed, last=0.4 + seed / 1000) for seed in seeds),
        *(result(STAGE, "m2po", plan.STALEST, seed, last=0.45 + seed / 1000) for seed in seeds),
        *(result(STAGE, "m2po", plan.STALEST, seed, "threshold0.16", 0.46 + seed / 1000) for seed in seeds),
    ]
    common = {"config": plan.ARITHMETIC, "versions": {"verl": "0"}, "machine": "a machine"}
    times = StepTimes({"grpo": 0.1, "m2po": 0.11}, 40, "a machine", "2026-01-01")
    comparison_page.write(common, [*grid, *runs], page, times)
    written = page.read_text()
    assert "| M2PO | `threshold=0.16` | 0.447 | 1% | taken |" in written
    assert (
        tmp_path / "figures" / "results" / "comparison.svg"
    ).is_file() and "(figures/results/comparison.svg)" in written
    first, second = (line for line in written.splitlines() if line.startswith(("| M2PO | 3", "| GRPO | 3")))
    assert first.startswith("| M2PO | 3 | 0.415 ± ") and "| 0.421 ± " in first and "| 50% [" in first
    assert "| 1% | 0.010 | 1.10 | none |" in first and times.provenance in written
    assert second.startswith("| GRPO | 3 | 0.381 ± ") and "| that of the preset |" in second


def test_the_oldest_data_has_a_table_of_its_own_the_best_first():
    oldest = comparison_plan.OLDEST
    runs = [
        result(STAGE, "m2po", oldest, 1, last=0.4),
        result(STAGE, "m2po", oldest, 1, "threshold0.16", last=0.5),
        result(STAGE, "topr", oldest, 1, last=0.45),
        result(STAGE, "topr", plan.STALEST, 1, last=0.9),
    ]
    _, _, *rows = comparison_page.oldest_table(runs)
    assert [row.split(" | ")[0] for row in rows] == ["| M2PO `threshold=0.16`", "| `topr`", "| M2PO"]
    assert comparison_page.oldest_table([]) == ["Not run yet."]


def test_ages_are_compared_after_as_many_trainer_steps():
    """What ran longer on the stalest data is compared at the step of the others."""
    (whole,) = [result(STAGE, "m2po", plan.STALEST, 1, last=0.4)]
    longer = replace(
        whole,
        steps=[*whole.steps, plan.STEPS + 100],
        accuracy=[*whole.accuracy, 0.9],
        curves={name: [*values, 0.01] for name, values in whole.curves.items()},
    )
    younger = [result(AGES_STAGE, "m2po", age, 1, last=0.7 + age / 1000) for age in (64, 0)]
    other = result(AGES_STAGE, "grpo", 0, 1)
    header, _, *rows = comparison_page.ages_table([longer, *younger, other])
    assert header == "|  | seeds | on-policy | s=64 | s=256 |"
    assert rows == ["| M2PO | 1/1/1 | 0.580 | 0.623 | 0.380 |"]


def test_one_call_runs_the_grid_then_all_as_published_and_what_these_found_best(tmp_path, monkeypatch):
    data = tmp_path / "comparison.json"
    common = {"config": plan.ARITHMETIC, "model": {}, "versions": {}, "machine": "a machine"}
    calls = []

    def run(jobs, *_) -> None:
        """All are equally good, but M2PO with a threshold of 0.16 on the trial's seed."""
        calls.append(jobs)
        finals = {job: 0.5 if job.stage == GRID and job.variant == "threshold0.16" else 0.4 for job in jobs}
        found = [result(job.stage, job.loss, job.staleness_updates, job.seed, job.variant, finals[job]) for job in jobs]
        results.write(common | {"runs": results.plain(found)}, data)

    monkeypatch.setattr(study, "_run", run)
    study.compare(tmp_path, known=data)
    assert calls[0] == comparison_plan.grid()
    assert all(job in calls[1] for job in comparison_plan.jobs({"m2po": "threshold0.16"}))
    assert not any(job.staleness_updates == comparison_plan.OLDEST for job in calls[1])
    oldest = Counter(job.loss for job in calls[2] if job.staleness_updates == comparison_plan.OLDEST)
    assert len(oldest) == comparison_plan.AT_OLDEST
    assert calls[3:] == []

    calls.clear()
    study.compare(tmp_path, known=None, once=True)
    assert calls[0] == comparison_plan.grid() and {job.seed for job in calls[1]} == {plan.TRIAL_SEED, plan.SEEDS[0]}


@pytest.mark.parametrize("loss", ALTERNATIVES)
def test_no_method_has_more_settings_than_m2po(loss):
    assert len(ALTERNATIVES[loss]) <= len(ALTERNATIVES["m2po"])
