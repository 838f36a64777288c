"""What the study tried beside M2PO: its losses by what they are meant to do, its queue, its table."""

from collections import Counter

import pytest
import torch

from staleness_study import collect, long_plan, plan, tried, tried_page, tried_plan
from staleness_study.results import Result
from staleness_study.tried import prefix_mask, present_baseline, without_solved
from staleness_study.tried._groups import Tried, present_share
from verl_m2po.losses.kernel.tokens import tokens_of

SETTINGS = Tried(responses=4)


def tokens(log_ratio, advantages):
    """Two tokens a response, the log ratio in the first."""
    old = torch.full((len(log_ratio), 2), -1.0)
    new = old.clone()
    new[:, 0] += torch.tensor(log_ratio)
    return tokens_of(new, old, torch.tensor(advantages)[:, None].expand(-1, 2), torch.ones_like(old))


ADVANTAGES = [1.5, -0.5, -0.5, -0.5]


def test_of_fresh_data_each_is_m2po():
    """Without a ratio no mask, no weight and no baseline differs: the derivative is the negative advantage."""
    fresh = tokens([0.0] * 4, ADVANTAGES)
    for name in tried.names():
        loss = tried.loss(name)
        search = loss.decision.search(SETTINGS, 0.0)
        search.add(fresh)
        found = loss.rule(fresh, SETTINGS, search.solve())
        assert found.keep.all(), name
        torch.testing.assert_close(found.derivative, -fresh.advantages, msg=name)


def test_the_baseline_is_the_mean_under_the_present_policy():
    seen = tokens([1.0, 0.0, -1.0, 0.0], ADVANTAGES)
    weights = present_share(seen, 4)[0]
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, -1.0, 0.0]).softmax(0))
    rebased = present_baseline.rebased(seen, SETTINGS).advantages[:, 0]
    assert float((weights * rebased).sum()) == pytest.approx(0, abs=1e-6)
    assert float(rebased[0]) < 1.5, "a success that is likelier now is less of a surprise"


def test_a_prompt_that_is_solved_by_now_is_left_out():
    solved, unsolved = tokens([3.0, -2.0, -2.0, -2.0], ADVANTAGES), tokens([0.5, 0.0, 0.0, 0.0], ADVANTAGES)
    assert not without_solved.unsolved(solved, SETTINGS).any()
    assert without_solved.unsolved(unsolved, SETTINGS).all()


def test_a_prefix_counts_by_the_root_of_its_length():
    seen = tokens([0.5], [1.0])
    magnitude = prefix_mask.prefix_magnitude(seen, SETTINGS)[0]
    torch.testing.assert_close(magnitude, torch.tensor([0.5, 0.5 / 2**0.5]))


@pytest.mark.parametrize("config", tried_plan.TASKS)
def test_every_run_has_its_own_folder_and_a_seed_that_is_not_reported(tmp_path, config):
    jobs, (stage, _) = tried_plan.jobs(config), tried_plan.TASKS[config]
    assert max(Counter(job.folder(tmp_path) for job in jobs).values()) == 1
    assert {job.variant for job in jobs if job.stage == stage} == {"", *tried.names()}
    assert not {job.seed for job in jobs} & set(plan.SEEDS)


def test_every_change_is_tried_at_ten_times_the_learning_rate_on_the_short_task():
    short, long = (
        [j for j in tried_plan.jobs(config) if j.stage == tried_plan.HOT_STAGE] for config in tried_plan.TASKS
    )
    assert not long and Counter(job.seed for job in short) == dict.fromkeys(tried_plan.SEEDS, len(tried.names()) + 3)
    assert {tried_plan.hot_variant(change) for change in ("", *tried.names())} == {job.variant for job in short}
    assert all(job.overrides[0] == "actor_rollout_ref.actor.optim.lr=0.0003" for job in short)


def test_the_tasks_share_no_folder(tmp_path):
    short, long = (tried_plan.jobs(config) for config in (plan.ARITHMETIC, long_plan.CONFIG))
    assert not {job.folder(tmp_path) for job in short} & {job.folder(tmp_path) for job in long}


def test_the_table_has_what_ran_and_its_difference_to_m2po(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- tried: begin -->\n<!-- tried: end -->\n")
    curves = {name: [0.01, 0.01] for name in collect.CURVES}
    runs = [
        Result("tried", "m2po", 256, 4, seed, variant, [0, 25, 50], [0.34, last, last], curves, 60.0)
        for variant, last in (("", 0.4), ("prefix_mask", 0.43))
        for seed in tried_plan.SEEDS
    ]
    runs += [
        Result(tried_plan.HOT_STAGE, "m2po", 256, 4, 101, variant, [0, 25, 50], [0.34, last, last], curves, 60.0)
        for variant, last in (("lr0.0003", 0.1), ("prefix_mask-lr0.0003", 0.13))
    ]
    common = {"config": plan.ARITHMETIC, "versions": {"verl": "0"}, "machine": "a machine"}
    tried_page.write([(common, runs)], page)
    written = page.read_text()
    assert "| `prefix_mask` | 2 | 0.400 | +2.00 |" in written
    assert "At ten times the learning rate:" in written and "| `prefix_mask` | 1 | 0.200 | +2.00 |" in written
    assert "`python -m staleness_study tried`; 6 runs" in written
    tried_page.write([], page)
    assert "Not run yet." in page.read_text()
