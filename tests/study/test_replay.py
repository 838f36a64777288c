"""The study's stage `replay`: its queue, and what its table makes of the runs."""

import json
import shutil
from collections import Counter

import pytest

from staleness_study import exact, replay_figures, replay_page, replay_plan, verl_runs
from staleness_study.collect import variant_of
from staleness_study.plan import REPLAY_CLOCK, SEEDS
from staleness_study.results import PROMPTS, SECONDS, Result, load, write
from staleness_study.verl_runs import Condition


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


def test_an_epoch_is_a_use_so_all_are_compared_after_as_many_updates():
    """Four updates a trainer step, times the epochs."""
    for condition in replay_plan.conditions():
        job, shown = replay_plan.job(condition, 1), replay_plan.steps_shown(condition)
        assert shown * (4 if "epochs" in job.variant else 1) == 1000
        assert job.steps >= shown


def test_four_uses_run_until_a_third_of_the_prompts_of_on_policy_training():
    """32 prompts a batch; 8 of them new with four uses, but for the first batch."""
    on_policy, *replayed = (replay_plan.job(condition, 1) for condition in replay_plan.CORE)
    for job in replayed:
        assert 0.99 / 3 < (32 + 8 * (job.steps - 1)) / (32 * on_policy.steps) <= 1 / 3


def test_what_ran_longer_is_compared_at_the_step_of_the_others():
    longer = result("m2po", "x4", 256, 1, [0.3 + 0.01 * i for i in range(54)], prompts=8)
    (shown,) = replay_page.compared([longer], ("m2po", "x4", 256))
    assert (longer.steps[-1], shown.steps[-1], shown.curves[PROMPTS][-1]) == (1325, 1000, 8000)
    assert shown.final == pytest.approx(0.3 + 0.01 * 38.5)


def test_prompts_until_as_good_as_on_policy_training_at_its_end():
    """It ends at 0.45; four validations have that mean at step 125 for the first time, or never."""
    reference = result("grpo", "", 0, 1, [0.3, 0.45, 0.45, 0.45, 0.45], prompts=32)
    there = result("m2po", "x4", 256, 1, [0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5], prompts=8)
    never = result("grpo", "x4", 256, 1, [0.3] * 7, prompts=8)
    assert replay_page.prompts_to_match(there, reference) == pytest.approx(8 * 125 / (32 * 100))
    m2po, grpo = replay_page.shares_to_match([reference, there, never])
    assert "on 1 of 1 seeds, with 31% of its prompts (run until 150 trainer steps)" in m2po
    assert "on 0 of 1 seeds (run" in grpo


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
        result("topr", "x4", 256, 1, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8], prompts=8),
    ]
    common = {"config": "c", "model": {}, "versions": {"verl": "0"}, "machine": "a machine"}
    write(common | {"runs": [vars(run) for run in runs]}, tmp_path / "replay.json")
    data, loaded = load(tmp_path / "replay.json")
    page = tmp_path / "page.md"
    sections = (replay_page.SECTION, replay_page.CLOCK_SECTION)
    page.write_text("".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in sections))
    replay_page.write(data, loaded, [], page)
    written = page.read_text()
    assert "| M2PO | GRPO | no trust region | `topr` | `m2po_tapered` | `dppo` | on-policy GRPO after" in written
    assert "| 4 uses, window 256 updates | 1,000 | 1/0 | 0.625 | - | - | 0.650 | - | - | 0.400 |" in written
    assert "| 4 uses, window 256 updates | - | - | +2.50 | - | - |" in written
    assert "against on-policy GRPO: -2.5 points (1 seed)" in written
    assert "Not run yet." in written


def test_the_figure_has_a_line_for_each_condition_by_prompts_and_by_updates_and_the_times_where_there_are_any(tmp_path):
    assert replay_figures.save([], [], tmp_path) == []
    runs = [
        result("grpo", "", 0, 1, [0.3, 0.4, 0.5], prompts=32),
        *(result("m2po", "x4", 256, seed, [0.3, 0.4, 0.5, 0.6], prompts=8) for seed in (1, 2)),
    ]
    figure = replay_figures.draw(runs, [])
    assert figure is not None
    by_prompts, by_updates = ([list(line.get_xdata()) for line in axes.lines] for axes in figure.axes)
    assert by_prompts == [[800, 1600], [200, 400, 600]]
    assert by_updates == [[100, 200], [100, 200, 300]]
    with_times = replay_figures.draw(runs, [timed(verl_runs.REPLAY_CLOCK[0], [0.3] * 6, 9.0)])
    assert with_times is not None
    assert list(with_times.axes[2].lines[0].get_xdata()) == [0.0, 45.0, 90.0, 135.0, 180.0, 225.0]
    assert replay_figures.save(runs, [], tmp_path) and (tmp_path / "replay.svg").is_file()


def timed(condition: Condition, accuracy: list[float], a_step_s: float) -> Result:
    steps = [5 * i for i in range(len(accuracy))]
    curves = {SECONDS: [a_step_s * step for step in steps[1:]]}
    return Result(REPLAY_CLOCK, condition.loss, 0, 8, 1, variant_of(condition), steps, accuracy, curves, 60.0)


def test_times_to_an_accuracy_are_shares_of_syncs():
    """Exact accuracies: the first that reaches it counts."""
    sync, without, with_replay = verl_runs.REPLAY_CLOCK
    runs = [
        timed(with_replay, [0.3, 0.4, 0.4, 0.4, 0.4], 3.0),
        timed(sync, [0.3, 0.38, 0.42, 0.5, 0.6], 9.0),
        timed(without, [0.3, 0.3, 0.3, 0.3, 0.4], 6.0),
    ]
    first, second, third = replay_page.wall_clock(runs)[2:]
    assert first.startswith("| GRPO, `sync` | 1 | 20 | 9.00 s |") and "| 90 s (100%) |" in first
    assert second.startswith("| M2PO, `bounded_async` | 1 |") and "| 120 s (133%) | not reached |" in second
    assert "`bounded_async replay=x4` | 1 | 20 | 3.00 s | 0.400 | 15 s (17%) | not reached |" in third


def test_the_timed_runs_differ_in_replay_alone_and_each_has_its_folder(tmp_path):
    runs = [verl_runs.VerlRun.next_attempt(tmp_path, each, 1, 120) for each in verl_runs.REPLAY_CLOCK]
    assert len({run.folder for run in runs}) == 3
    once, again = ({each for each in run.overrides if "default_local_dir" not in each} for run in runs[1:])
    bound = "trainer.v1.bounded_async"
    assert once - again == {f"{bound}.staleness_updates=8"}
    assert again - once == {"replay=x4", f"{bound}.staleness_updates=128", f"{bound}.ahead_updates=8"}
    assert [run.attempt for run in runs] == [1, 1, 1]
    runs[2].metrics.parent.mkdir(parents=True)
    runs[2].metrics.touch()
    assert verl_runs.VerlRun.next_attempt(tmp_path, verl_runs.REPLAY_CLOCK[2], 1, 120).attempt == 2


def test_checkpoints_are_measured_as_the_bench_measures(tiny, tmp_path):
    folder = tmp_path / "checkpoints" / "global_step_10" / "actor" / "huggingface"
    shutil.copytree(tiny, folder)
    (tmp_path / "checkpoints" / "global_step_20").mkdir()
    assert exact.read(tmp_path) == {}
    exact.measure(tmp_path, tiny, digits=2)
    measured = exact.read(tmp_path)
    assert measured.keys() == {0, 10} and measured[0] == measured[10]
    assert measured[0] == pytest.approx(json.loads((tiny / "recipe.json").read_text())["sampled_accuracy"], abs=1e-3)
