"""The study's stage `prosperity`: its queue, its section and its figure."""

from collections import Counter

from staleness_study import collect, plan, prosperity_page, prosperity_plan
from staleness_study.prosperity_plan import (
    CONDITIONS,
    LATER_STAGE,
    LATER_TRIAL_STAGE,
    RATE,
    REPORTED,
    STAGE,
    TRIAL_STAGE,
)
from staleness_study.results import Result
from verl_m2po.one_process import setup as setups


def result(stage: str, loss: str, updates: int, seed: int, accuracy: list[float], variant: str) -> Result:
    steps = [5 * i for i in range(len(accuracy))]
    curves = {name: [0.01] * (len(steps) - 1) for name in collect.CURVES}
    return Result(stage, loss, updates, 4, seed, variant, steps, accuracy, curves, 60.0)


def test_one_rate_is_compared_on_seeds_that_did_not_choose_it():
    jobs = prosperity_plan.jobs()
    compared = [job for job in jobs if job.stage == STAGE]
    seeds = Counter((job.loss, job.staleness_updates, job.variant) for job in compared)
    at = prosperity_plan.VARIANT
    others = {("m2po", plan.STALEST, f"{at}-threshold0.01"): 1, ("m2po_clip", plan.STALEST, at): 1}
    assert seeds == dict.fromkeys(((*condition, at) for condition in CONDITIONS), len(REPORTED)) | others
    assert plan.TRIAL_SEED not in {job.seed for job in compared}
    assert {job.seed for job in jobs if job.stage == TRIAL_STAGE} == {plan.TRIAL_SEED}
    for setup in (setups.read(job.all_overrides, job.config) for job in compared[:2]):
        assert setup.actor.optim.lr == RATE
        assert setup.config.trainer.test_freq == prosperity_plan.VALIDATE_EVERY


def test_the_section_has_a_collapse_and_where_it_was_looked_for(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- prosperity: begin -->\n<!-- prosperity: end -->\n")
    rises, falls = [0.3, 0.4, 0.5, 0.5, 0.5, 0.5], [0.3, 0.45, 0.1, 0.0, 0.0, 0.0]
    at = prosperity_plan.VARIANT
    runs = [
        result(TRIAL_STAGE, "no_trust_region", 256, 101, falls, "lr0.0003"),
        *(result(STAGE, "no_trust_region", 256, seed, falls, at) for seed in REPORTED),
        *(result(STAGE, "m2po", 256, seed, rises, at) for seed in REPORTED),
        result(STAGE, "m2po", 256, 1, rises, f"{at}-threshold0.01"),
    ]
    common = {"config": prosperity_plan.CONFIG, "versions": {"verl": "0"}, "machine": "a machine"}
    prosperity_page.write(common, runs, page)
    collapsed, held, tried = (
        next(line for line in page.read_text().splitlines() if line.startswith(beginning))
        for beginning in (
            f"| no trust region, s=256, learning rate {RATE:g} | 3 |",
            f"| M2PO, s=256, learning rate {RATE:g} | 3 |",
            "| no trust region, s=256, learning rate 0.0003 | 1 |",
        )
    )
    assert collapsed.endswith("| 10 (3/3) |") and held.endswith("| none |") and tried.endswith("| 10 (1/1) |")
    assert f"| M2PO, s=256, learning rate {RATE:g}, threshold 0.01 | 1 |" in page.read_text()
    assert (tmp_path / "figures" / "results" / "prosperity.svg").is_file()


def test_a_smaller_rate_over_more_steps_has_a_figure_and_tables_of_its_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- prosperity: begin -->\n<!-- prosperity: end -->\n")
    jobs = [job for job in prosperity_plan.jobs() if job.stage in (LATER_STAGE, LATER_TRIAL_STAGE)]
    assert {job.seed for job in jobs if job.stage == LATER_STAGE} == set(REPORTED)
    assert {job.seed for job in jobs if job.stage == LATER_TRIAL_STAGE} == {plan.TRIAL_SEED}
    assert setups.read(jobs[0].all_overrides, jobs[0].config).actor.optim.lr == prosperity_plan.LATER_TRIALS[0][1]
    falls = [0.3, 0.45, 0.5, 0.2]
    runs = [result(job.stage, job.loss, job.staleness_updates, job.seed, falls, job.variant) for job in jobs]
    common = {"config": prosperity_plan.CONFIG, "versions": {"verl": "0"}, "machine": "a machine"}
    prosperity_page.write(common, runs, page)
    text = page.read_text()
    assert "| no trust region, s=256, learning rate 0.0001, 500 trainer steps | 3 |" in text
    assert "| no trust region, s=256, learning rate 0.00012, 400 trainer steps | 1 |" in text
    assert (tmp_path / "figures" / "results" / "prosperity_later.svg").is_file()


def test_nothing_is_drawn_of_nothing():
    assert prosperity_page.draw([]) is None
    assert prosperity_page.draw([result(STAGE, "m2po", 256, 1, [0.3, 0.4], "lr1")]) is None
