"""The study's comparison: its grid, what is taken of it, its tables."""

from collections import Counter

import pytest
from omegaconf import OmegaConf

from staleness_study import comparison_page, comparison_plan, plan
from staleness_study.comparison_plan import ALTERNATIVES, CHOSEN, GRID, STAGE
from staleness_study.results import CURVES, Result
from staleness_study.run import CONFIG_FILES
from verl_m2po.one_process import setup as setups


def result(stage: str, loss: str, updates: int, seed: int, variant: str = "", last: float = 0.4) -> Result:
    curves = {name: [0.01, 0.01] for name in CURVES}
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


def test_every_run_has_its_own_folder(tmp_path):
    jobs = [*comparison_plan.grid(), *comparison_plan.jobs({"m2po": "threshold0.16", "grpo": ""})]
    assert max(Counter(job.folder(tmp_path) for job in jobs).values()) == 1


def test_the_grid_has_a_seed_of_its_own_and_the_comparison_every_reported_one():
    assert {job.seed for job in comparison_plan.grid()} == {plan.TRIAL_SEED}
    seeds = Counter((job.loss, job.staleness_updates) for job in comparison_plan.jobs({}))
    assert set(seeds.values()) == {len(plan.SEEDS)}
    assert len(seeds) == len(ALTERNATIVES) * len(comparison_plan.AGES)


def test_methods_and_settings_are_those_of_the_config():
    options = {path.stem for path in (CONFIG_FILES / "loss").glob("*.yaml")}
    assert set(ALTERNATIVES) <= options
    config = setups.read([], plan.ARITHMETIC).config
    for job in comparison_plan.grid():
        for override in job.overrides:
            key = override.partition("=")[0]
            assert OmegaConf.select(config, key, default="absent") != "absent", override


def test_what_is_best_of_a_whole_grid_is_taken_and_run_on_the_stalest_data():
    chosen = comparison_page.best_settings(whole_grid({"m2po": "threshold0.16", "grpo": ""}))
    assert (chosen["m2po"], chosen["grpo"]) == ("threshold0.16", "")
    runs = [job for job in comparison_plan.jobs(chosen) if job.variant == CHOSEN and job.loss in ("m2po", "grpo")]
    assert {(job.loss, job.staleness_updates, job.overrides) for job in runs} == {
        ("m2po", plan.STALEST, ALTERNATIVES["m2po"]["threshold0.16"])
    }


def test_of_a_grid_that_is_not_whole_nothing_is_taken():
    partial = [run for run in whole_grid({}) if (run.loss, run.variant) != ("m2po", "threshold0.64")]
    chosen = comparison_page.best_settings(partial)
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
        *(result(STAGE, "m2po", plan.STALEST, seed, CHOSEN, 0.46 + seed / 1000) for seed in seeds),
    ]
    common = {"config": plan.ARITHMETIC, "versions": {"verl": "0"}, "machine": "a machine"}
    comparison_page.write(common, [*grid, *runs], page)
    written = page.read_text()
    assert "| M2PO | `threshold=0.16` | 0.447 | 1% | taken |" in written
    first, second = (line for line in written.splitlines() if line.startswith(("| M2PO | 3", "| GRPO | 3")))
    assert first.startswith("| M2PO | 3 | 0.415 ± ") and "| 50% [" in first
    assert second.startswith("| GRPO | 3 |") and "| that of the preset |" in second


@pytest.mark.parametrize("loss", ALTERNATIVES)
def test_no_method_has_more_settings_than_m2po(loss):
    assert len(ALTERNATIVES[loss]) <= len(ALTERNATIVES["m2po"])
