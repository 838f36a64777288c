"""Faults on a real run: SIGTERM amid a checkpoint. `make faults` tries more; what heals: tests/e2e/test_healing.py."""

from pathlib import Path

import fault_campaign
import fault_runs
import fault_seeds
import kill_plan
import pytest


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("1-4", [1, 2, 3, 4]), ("1,4-5,9", [1, 4, 5, 9])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert fault_campaign.parse_seeds(text) == seeds


@pytest.mark.parametrize("row", [0, 1, 2])
def test_twelve_seeds_cover_targets_kinds_and_moments(row):
    seeds = range(1 + 12 * row, 13 + 12 * row)
    faults = [fault_seeds.Fault.draw(seed) for seed in seeds]
    assert {fault.target for fault in faults} == set(fault_seeds.DRAWN)
    assert {fault.kind for fault in faults} == set(fault_seeds.KINDS[row])
    assert {fault.moment for fault in faults} == set(fault_seeds.MOMENTS)
    assert faults == [fault_seeds.Fault.draw(seed) for seed in seeds]


def test_48_seeds_try_every_target_at_every_moment():
    pairs = {(fault.target, fault.moment) for fault in map(fault_seeds.Fault.draw, range(1, 49))}
    assert len(pairs) == len(fault_seeds.DRAWN) * len(fault_seeds.MOMENTS)


@pytest.mark.parametrize("mode", fault_campaign.CHAINED)
def test_a_chain_follows_from_its_seed_and_hits_what_its_mode_replaces_at_every_moment(mode):
    strikes = kill_plan.draw(mode, 30, seed=1)
    assert strikes == kill_plan.draw(mode, 30, seed=1) != kill_plan.draw(mode, 30, seed=2)
    assert sum(len(strike.targets) for strike in strikes) >= 30
    is_separate = mode in fault_runs.SEPARATE_MODES
    in_push = {(target, "push") for target in kill_plan.SERVERS} if is_separate else set()
    moments = set(fault_runs.METHODS) - {"push"}
    hit = {(strike.targets[0], strike.moment) for strike in strikes if strike.targets}
    assert hit == {(target, moment) for target in kill_plan.healable(mode) for moment in moments} | in_push
    pushes = {kill_plan.IN_PUSH, kill_plan.MISSED}
    assert {strike.pattern for strike in strikes} == set(kill_plan.ROUND) - (set() if is_separate else pushes)


def test_what_shares_its_processes_with_the_trainer_is_not_replaced():
    assert set(kill_plan.healable("stale_k")) == {"agent loop worker", "reward worker"}
    assert set(kill_plan.healable("bounded_async")) >= set(kill_plan.SERVERS)


@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.feature("resuming from a checkpoint", mode="stale_k_separate")
def test_nothing_is_lost_whatever_happens(tmp_path: Path):
    (fault,) = fault_seeds.run_all([6], tmp_path)
    assert fault.kind == "stale_k_separate" and fault.problems == []
    assert fault.recovered_after_s, "the restart trained on"
