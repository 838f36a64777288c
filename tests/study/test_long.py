"""The study's stage `long`: its queue, and its section of the page."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from staleness_study import collect, comparison_plan, long_page, long_plan, plan, rival_figures, rivals
from staleness_study import run as driver
from staleness_study.results import Result, load
from staleness_study.run import CONFIG_FILES

REPOSITORY = Path(__file__).parents[2]


def result(stage: str, loss_name: str, updates: int, seed: int, variant: str = "") -> Result:
    steps, accuracy = [0, 50, 100], [0.34, 0.4, 0.5]
    curves = {name: [0.01, 0.01] for name in collect.CURVES}
    return Result(stage, loss_name, updates, 4, seed, variant, steps, accuracy, curves, 60.0)


def test_every_run_has_its_own_folder_and_is_of_the_long_task(tmp_path):
    jobs = long_plan.jobs()
    assert max(Counter(job.folder(tmp_path) for job in jobs).values()) == 1
    assert {job.config for job in jobs} == {"column_addition_staleness"}
    assert [job.stage for job in jobs[:5]] == [long_plan.TRIAL_STAGE] * 4 + [long_plan.STAGE]


def test_the_claim_has_every_seed_and_its_rivals_are_options_of_the_group_loss():
    presets = [job for job in long_plan.jobs() if job.stage == long_plan.STAGE and not job.variant]
    seeds = Counter((job.loss, job.staleness_updates) for job in presets)
    assert all(seeds[condition] == len(plan.SEEDS) for condition in plan.CLAIM)
    assert {count for (_, updates), count in seeds.items() if updates == plan.STALEST} == {len(plan.SEEDS)}
    assert min(seeds.values()) == len(plan.SWEEP_SEEDS)
    options = {path.stem for path in (CONFIG_FILES / "loss").glob("*.yaml")}
    assert {name for name, _ in seeds} <= options


def taken_of(file: str, stage: str) -> dict[str, str]:
    """What a grid in the committed results took in the place of the preset's, of methods that run here."""
    settings = rivals.best_settings(load(REPOSITORY / "docs" / "results" / file)[1], stage)
    here = {job.loss for job in long_plan.jobs()}
    return {loss: setting for loss, setting in settings.items() if setting and loss in here}


def test_settings_are_those_that_the_grids_took():
    assert taken_of("comparison.json", comparison_plan.GRID) == long_plan.SETTINGS
    assert taken_of("long.json", long_plan.GRID_STAGE) == long_plan.SETTINGS_HERE
    ran = [job for job in long_plan.jobs() if job.variant and job.stage == long_plan.STAGE]
    settings = {*long_plan.SETTINGS.items(), *long_plan.SETTINGS_HERE.items()}
    assert Counter((job.loss, job.variant) for job in ran) == dict.fromkeys(settings, len(plan.SWEEP_SEEDS))
    assert all(job.overrides == comparison_plan.ALTERNATIVES[job.loss][job.variant] for job in ran)
    assert {job.seed for job in long_plan.grid()} == {plan.TRIAL_SEED}
    assert {job.loss for job in long_plan.grid()} == {"grpo", "m2po", "topr", "m2po_tapered", *long_plan.RIVALS}


def test_a_setting_is_compared_with_its_preset_on_the_same_seeds():
    preset = [result(long_plan.STAGE, "grpo", 256, seed) for seed in (1, 2, 3)]
    wide = [replace(run, variant="clip0.8_0.8", accuracy=[0.34, 0.5, 0.6]) for run in preset[:2]]
    rows = long_page.settings_table([*preset, *wide])[2:]
    setting = "GRPO `clip_ratio_low=0.8` `clip_ratio_high=0.8`"
    assert rows == [f"| {setting} | short and long responses | 2 | 0.480 | +6.67 | 1% | none |"]


def test_what_a_run_depends_on_is_that_of_its_own_task():
    (trial, *_), (short, *_) = long_plan.jobs(), plan.jobs()
    assert driver.provenance(trial)["model"]["task"] == "column_addition"
    assert driver.provenance(short)["model"]["digits"] == 3


def test_the_best_method_on_the_stalest_data_comes_first():
    better = replace(result(long_plan.STAGE, "topr", 256, 1), accuracy=[0.34, 0.5, 0.6])
    younger = result(long_plan.STAGE, "m2po", 64, 1)
    rows = long_page.rivals_table([result(long_plan.STAGE, "m2po", 256, 1), younger, better])[2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| `topr`", "1/0/0"], ["| M2PO", "1/1/0"]]


def test_the_figure_has_every_age_and_the_settings_on_the_stalest_data_alone():
    runs = [result(long_plan.STAGE, "grpo", age, 1) for age in (256, 64, 0)]
    wide = replace(runs[0], variant="clip0.8_0.8", accuracy=[0.34, 0.5, 0.6])
    stalest, between, fresh = long_page.panels([*runs, wide])
    assert [panel.published for panel in (stalest, between, fresh)] == [{"grpo": [runs[0].final]}] * 3
    assert stalest.chosen["grpo"] == [wide.final] and not between.chosen and not fresh.chosen
    assert [panel.reference for panel in (stalest, between, fresh)] == [[runs[2].final]] * 3
    figure = rival_figures.draw(["grpo"], [stalest, between, fresh], one_scale=True)
    assert figure and len({axes.get_xlim() for axes in figure.axes}) == 1
    dots = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert dots == [runs[0].final, wide.final]


def test_the_table_of_the_claim_leaves_the_rivals_to_their_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- long: begin -->\n<!-- long: end -->\n")
    runs = [
        replace(result(long_plan.STAGE, loss, age, seed), accuracy=[0.34, 0.4, 0.5 + gain])
        for loss, age, gain in (("grpo", 0, 0.1), ("grpo", 256, 0.0), ("m2po", 256, 0.05), ("vespo", 256, 0.08))
        for seed in (1, 2, 3)
    ]
    long_page.write({"config": long_plan.CONFIG, "versions": {}, "machine": "a machine"}, runs, page)
    written = page.read_text()
    assert "recovered by M2PO" in written and "recovered by `vespo`" not in written and "| `vespo` | 3/0/0 |" in written


def test_the_section_has_the_trials_and_what_came_of_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- long: begin -->\n<!-- long: end -->\n")
    runs = [
        result(long_plan.TRIAL_STAGE, "grpo", 256, 101, "lr1e-05"),
        *(result(long_plan.STAGE, "m2po", 256, seed) for seed in (1, 2, 3)),
        *(result(long_plan.STAGE, "grpo", 0, seed) for seed in (1, 2, 3)),
    ]
    common = {"config": long_plan.CONFIG, "versions": {"verl": "0"}, "machine": "a machine"}
    long_page.write(common, runs, page)
    written = page.read_text()
    assert "| GRPO, s=256, learning rate 1e-05 | 1 |" in written
    assert "| M2PO | 3/0/0 | 0.413 ± 0.000 | - | - | - | 1% | 0.010 | none |" in written
    assert "`python -m staleness_study long`; 7 runs" in written
    assert "(figures/results/long.svg)" in written and (tmp_path / "figures" / "results" / "long.svg").is_file()
    assert pytest.approx(runs[1].final) == 0.4133333
