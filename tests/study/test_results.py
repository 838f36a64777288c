"""What the study makes of its runs, on numbers that can be checked by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from staleness_study import collect, plan
from staleness_study import page as pages
from staleness_study import results as studied
from staleness_study.intervals import Interval, difference, recovered_gap
from staleness_study.results import Result

COMMON = {"config": "arithmetic_staleness", "model": {}, "versions": {"verl": "0"}, "machine": "a machine"}
PAGE = "\n".join(
    f"<!-- {name}: begin -->\n<!-- {name}: end -->"
    for name in (
        *(
            "provenance",
            "claim",
            "half rate",
            "conditions",
            "hot",
            "learning rates",
            "thresholds",
            "causes",
            "through verl",
            "through verl, hot",
            "wall clock",
        ),
        *("methods", "methods figure", "claim figure", "wall clock figure", "other figures"),
    )
)


def result(loss, staleness, seed, accuracy, curve="clipped", share=0.01, stage="staleness"):
    steps = [25 * i for i in range(len(accuracy))]
    curves = {curve: [share] * (len(steps) - 1), "second_moment": [0.02] * (len(steps) - 1)}
    return Result(stage, loss, staleness, 4, seed, "", steps, accuracy, curves, 60.0)


def plain(*runs, machine="a machine", **common):
    return COMMON | {"machine": machine, "runs": studied.plain(runs)} | common


def test_merging_keeps_what_did_not_run_anew_and_names_both_machines():
    old, again, other = (result("grpo", 256, seed, [0.3, top]) for seed, top in ((1, 0.4), (1, 0.5), (2, 0.6)))
    merged = studied.merge(plain(again, machine="another"), plain(old, other))
    assert [run["accuracy"][-1] for run in merged["runs"]] == [0.5, 0.6]
    assert merged["machine"] == "a machine and another"
    assert studied.merge(merged, merged) == merged
    assert studied.merge(plain(again, machine="another"), merged) == merged
    shorter = result("grpo", 256, 2, [0.1])
    assert studied.merge(plain(shorter), merged)["runs"] == merged["runs"], "a run that is still going"
    assert studied.merge({"runs": studied.plain([old])}, {"runs": studied.plain([other])}).keys() == {"runs"}


@pytest.mark.parametrize("key", ["config", "model", "versions"])
def test_runs_of_other_settings_are_not_put_into_one_table(key):
    run = result("grpo", 256, 1, [0.3, 0.4])
    with pytest.raises(ValueError, match=f"differ in '{key}': .*, and the new ones have other"):
        studied.merge(plain(run, **{key: "other"}), plain(run))


@pytest.mark.parametrize("key", ["config", "model", "versions", "config_files"])
def test_runs_under_one_folder_are_of_the_same_settings(key):
    common = {name: COMMON[name] for name in ("config", "model", "versions", "machine")}
    record = common | {"overrides": ["loss=grpo", "data.seed=1"]}
    assert collect._common({"old": record, "new": record | {"machine": "another", "config_files": "0"}}) == common
    record["config_files"] = "0"
    with pytest.raises(ValueError, match=f"old has {key} .*, and new has other"):
        collect._common({"old": record, "new": record | {"overrides": ["loss=grpo", "data.seed=2"], key: "other"}})


def test_the_config_files_of_runs_with_other_options_are_others():
    """The hash leaves out the options that a run did not choose."""
    common = {name: COMMON[name] for name in ("config", "model", "versions", "machine")}
    record = common | {"overrides": ["loss=grpo"], "config_files": "0"}
    assert collect._common({"a": record, "b": record | {"overrides": ["loss=m2po"], "config_files": "1"}}) == common


def test_what_earlier_results_have_in_full_is_not_in_the_queue(tmp_path):
    whole, short = (
        Result("methods", "rec", 256, 4, seed, "", [0, steps], [0.3, 0.4], {}, 1.0)
        for seed, steps in ((1, 300), (2, 25))
    )
    data = tmp_path / "study.json"
    studied.write(plain(whole, short), data)
    jobs = [plan.Job("methods", "rec", 256, seed, steps=300) for seed in (1, 2, 3)]
    jobs += [plan.Job("methods", "rec", 256, 1, variant="lr1"), plan.Job("methods", "rec", 0, 1)]
    assert studied.without_known(jobs, data) == jobs[1:]


def test_training_score_is_shown_where_it_is_kept():
    score = {"training_score": [0.1, 0.3, 0.5], "clipped": [0.0] * 3, "second_moment": [0.0] * 3}
    runs = [Result("verl", "grpo", 0, 8, 1, "", [0, 10, 20, 30], [0.3] * 4, score, 1.0)]
    runs.append(result("grpo", 256, 1, [0.3] * 5, stage="verl"))
    assert runs[0].final_score == pytest.approx(0.4) and runs[1].final_score is None
    header, _, first, second = pages.conditions(runs, "verl")
    assert header.startswith("|  | seeds | score of the last 20 batches | final accuracy |")
    assert first.startswith("| GRPO, on-policy | 1 | 0.400 | 0.300 |")
    assert second.startswith("| GRPO, s=256 | 1 | - | 0.300 |")
    assert pages.conditions(runs[:1], "verl", 0.3)[2].endswith("| 30 |")
    assert pages.conditions(runs[:1], "verl", 0.4)[2].endswith("| 0/1 seeds |")
    assert "score of" not in pages.conditions([result("grpo", 0, 1, [0.3] * 5)])[0]


def test_interval_is_students_t():
    interval = Interval.of([0.1, 0.2, 0.3])
    assert interval is not None and interval.mean == pytest.approx(0.2)
    # Sample deviation 0.1, t(2) = 4.302653.
    assert interval.half_width == pytest.approx(4.302653 * 0.1 / np.sqrt(3), rel=1e-6)
    assert Interval.of([]) is None
    single = Interval.of([0.5])
    assert single is not None and np.isnan(single.half_width)


def test_recovered_gap():
    share = recovered_gap([0.55] * 3, [0.5] * 3, [0.6] * 3)
    assert share == pytest.approx((0.5, 0.5, 0.5))
    share = recovered_gap([0.54, 0.55, 0.56], [0.49, 0.5, 0.51], [0.59, 0.6, 0.61])
    assert share is not None and share[0] == pytest.approx(0.5) and share[1] < 0.5 < share[2]
    assert recovered_gap([0.55] * 2, [0.5] * 3, [0.6] * 3) is None, "two seeds give no interval"
    assert recovered_gap([0.55] * 3, [0.7] * 3, [0.6] * 3) is None, "GRPO lost nothing"
    assert recovered_gap([0.55] * 3, [], []) is None


def test_the_interval_of_a_recovered_gap_covers_it_about_as_often_as_it_says():
    seed = 7
    print("seed", seed)
    generator = np.random.default_rng(seed)
    truth, trials, covered = 0.7, 400, 0
    for _ in range(trials):
        draws = [generator.normal(mean, sd, 5) for mean, sd in ((0.577, 0.0018), (0.563, 0.0016), (0.583, 0.0024))]
        share = recovered_gap(*draws)
        assert share is not None
        covered += share[1] <= truth <= share[2]
    assert 0.92 <= covered / trials <= 0.99


def test_differences_are_taken_seed_by_seed():
    method = [result("m2po", 256, seed, [0.3, 0.4 + 0.01 * seed]) for seed in (1, 2, 3, 9)]
    other = [result("grpo", 256, seed, [0.3, 0.38 + 0.01 * seed]) for seed in (1, 2, 3, 4)]
    interval = difference(method, other)
    assert interval is not None and interval.seeds == 3
    assert interval.mean == pytest.approx(0.01) and interval.half_width == pytest.approx(0, abs=1e-9)
    assert difference(method, []) is None


def test_means_leave_the_ramp_out():
    # 16 updates are 4 steps; with 200 updates, 50 steps, the first two of four windows are the ramp's.
    assert result("grpo", 16, 1, [0.3] * 5).mean("clipped") == pytest.approx(0.01)
    run = Result("staleness", "grpo", 200, 4, 1, "", [0, 25, 50, 75, 100], [0.3] * 5, {"clipped": [9, 9, 1, 3]}, 0.0)
    assert run.mean("clipped") == 2


def test_updates_of_a_trainer_step_are_those_of_all_its_epochs():
    sizes = {"data.train_batch_size": 32, collect.MINI_BATCH_SIZE: 8, "actor_rollout_ref.actor.ppo_epochs": 3}
    assert collect._updates_per_step(sizes) == 12


def test_a_stretch_without_numbers_stays_a_gap(tmp_path):
    at = pd.RangeIndex(0, 16)
    frame = pd.DataFrame({"actor/grad_norm": [0.0] + [1.0] * 5 + [np.nan] * 5 + [3.0] * 5}, index=at)
    run = SimpleNamespace(logged={"actor/grad_norm"}, series=lambda name: frame[name].dropna())
    curves = collect._curves(run, [0, 5, 10, 15], {"gradient_norm": "actor/grad_norm"})
    assert curves["gradient_norm"] == pytest.approx([1, np.nan, 3], nan_ok=True)
    kept = Result("staleness", "grpo", 0, 4, 1, "", [0, 5, 10, 15], [0.3] * 4, curves, 0.0)
    assert kept.mean("gradient_norm") == 2 and np.isnan(kept.mean("clipped"))
    path = tmp_path / "study.json"
    studied.write(plain(kept), path)
    assert "NaN" not in path.read_text()
    _, (loaded,) = studied.load(path)
    assert loaded.curves["gradient_norm"] == pytest.approx([1, np.nan, 3], nan_ok=True)


def test_page_from_results(tmp_path):
    rising = list(np.linspace(0.3, 0.5, 13))
    runs = [
        result(loss, age, seed, [a - lost + 0.001 * seed for a in rising], curve, share, stage="claim")
        for loss, age, lost, curve, share in (
            ("grpo", 0, 0.0, "clipped", 0.0001),
            ("grpo", 256, 0.04, "clipped", 0.02),
            ("m2po", 256, 0.01, "masked", 0.001),
            ("no_trust_region", 256, 0.02, "masked", 0.0),
        )
        for seed in (1, 2, 3)
    ]
    data = tmp_path / "results" / "study.json"
    studied.write(COMMON | {"runs": studied.plain(runs)}, data)
    assert json.loads(data.read_text())["machine"] == "a machine"
    common, loaded = studied.load(data)
    assert sorted(loaded, key=studied._order) == sorted(runs, key=studied._order)

    page = tmp_path / "results.md"
    page.write_text(PAGE)
    assert pages.write(common, loaded, {}, page) == ["claim"]
    text = page.read_text()
    assert "| GRPO at s=256 below on-policy | 4.0 points |" in text
    assert "| of that gap recovered by M2PO | 75% [" in text
    assert "2% / 0.1% = 20 |" in text
    assert text.count("Not run yet.") == 9
    assert (tmp_path / "figures" / "results" / "claim.svg").is_file()
    written = page.read_text()
    pages.write(common, loaded, {}, page)
    assert page.read_text() == written, "writing again changes nothing"


def test_the_claim_at_another_learning_rate_has_its_own_table(tmp_path):
    at_half = [
        replace(result(loss, age, seed, [final] * 5, curve, share, stage=plan.HALF_RATE_STAGE), variant="lr1.5e-05")
        for loss, age, final, curve, share in (
            ("grpo", 0, 0.50, "clipped", 0.0),
            ("grpo", 256, 0.48, "clipped", 0.012),
            ("m2po", 256, 0.495, "masked", 0.0003),
        )
        for seed in (1, 2, 3)
    ]
    page = tmp_path / "results.md"
    page.write_text(PAGE)
    pages.write(COMMON, at_half, {}, page)
    section = page.read_text().split("<!-- half rate: begin -->")[1].split("<!--")[0]
    assert "1.2% / 0.03% = 40 |" in section and "| M2PO, s=256, learning rate 1.5e-05 | 3 |" in section


def test_causes_are_measured_against_the_gap_of_the_claim():
    def runs(loss, age, final, stage, variant=""):
        curves = {"masked": [0.01], "second_moment": [0.02]}
        return [Result(stage, loss, age, 256, seed, variant, [0, 25], [final] * 2, curves, 1.0) for seed in (1, 2, 3)]

    claim = [*runs("grpo", 0, 0.6, "claim"), *runs("grpo", 256, 0.5, "claim"), *runs("m2po", 256, 0.57, "claim")]
    assert pages.causes(claim) == ["Not run yet."]
    more = [*runs("m2po", 256, 0.56, "causes", "micro_batch"), *runs("m2po", 64, 0.59, "causes")]
    rows = pages.causes([*claim, *more])[2:]
    assert [row.split(" | ")[3] for row in rows] == ["-", "-1.00 ± 0.00", "+2.00 ± 0.00"]
    assert [row.split(" | ")[4] for row in rows] == ["70% [70%, 70%]", "60% [60%, 60%]", "90% [90%, 90%]"]
    assert [row.split(" | ")[0] for row in rows][::2] == ["| nothing", "| data 64 updates old"]


def test_methods_stand_in_the_order_of_their_accuracy_on_the_stalest_data(tmp_path):
    def runs(loss, final, stage="methods"):
        return [result(loss, 256, seed, [0.3, final], stage=stage) for seed in (1, 2)]

    results = [*runs("grpo", 0.4), *runs("rec", 0.5), *runs("oapl", 0.2)]
    assert studied.by_accuracy(results, "methods", ["oapl", "grpo", "rec", "m2po"]) == ["rec", "grpo", "oapl"]
    lines = pages.methods([*results, *runs("m2po", 0.9, "staleness")])
    assert [line.split(" ")[1] for line in lines[2:]] == ["`rec`", "`grpo`", "`oapl`"]
    assert lines[0].startswith("| `loss=` | seeds | final accuracy, s=256 |") and lines[2].startswith("| `rec` | 2 |")
    assert pages.methods(runs("grpo", 0.4, "staleness")) == ["Not run yet."]
    assert pages.figures.save(results, tmp_path) == ["methods"]


def test_seconds_to_an_accuracy_are_those_of_the_first_mean_of_four_validations_that_reaches_it(tmp_path):
    def run(age, variant, accuracy, seconds):
        steps = [5 * i for i in range(len(accuracy))]
        curves = {"clipped": [0.0] * (len(steps) - 1), "seconds": seconds}
        return Result("wall_clock", "grpo", age, 8, 1, variant, steps, accuracy, curves, seconds[-1])

    sync = run(0, "", [0.3, 0.38, 0.42, 0.42, 0.42, 0.5], [10.0, 20.0, 30.0, 40.0, 50.0])
    separate = run(256, "separate", [0.3, 0.38, 0.39, 0.42, 0.42, 0.42], [5.0, 10.0, 15.0, 20.0, 25.0])
    # 0.42 at first is an outlier as long as the mean of four does not say so.
    assert sync.first_reaching(0.41) == 20 and sync.first_reaching(0.3) == 15
    assert sync.first_reaching(0.45) is None
    assert sync.seconds_at(20) == 40.0
    assert pages.figures.save([separate, sync], tmp_path) == ["wall_clock"]
    first, second = pages.wall_clock([separate, sync])[2:]
    assert (
        first.startswith("| GRPO, `sync` | 1 | 10 s | 2.00 s |") and "| 20 steps, 40 s, 1.00x | 25 steps, 50 s" in first
    )
    assert "`stale_k_separate`, s=256" in second and "| 20 steps, 20 s, 2.00x | not reached |" in second
