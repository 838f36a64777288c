"""Faults on a real run: SIGTERM amid a checkpoint. `make faults` tries more; what heals: tests/e2e/test_healing.py."""

from pathlib import Path

import fault_campaign
import fault_runs
import kill_chain
import pytest


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("1-4", [1, 2, 3, 4]), ("1,4-5,9", [1, 4, 5, 9])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert fault_campaign.parse_seeds(text) == seeds


@pytest.mark.parametrize("row", [0, 1, 2])
def test_twelve_seeds_cover_targets_kinds_and_moments(row):
    seeds = range(1 + 12 * row, 13 + 12 * row)
    faults = [fault_campaign.Fault.draw(seed) for seed in seeds]
    assert {fault.target for fault in faults} == set(fault_campaign.DRAWN)
    assert {fault.kind for fault in faults} == set(fault_campaign.KINDS[row])
    assert {fault.moment for fault in faults} == set(fault_campaign.MOMENTS)
    assert faults == [fault_campaign.Fault.draw(seed) for seed in seeds]


def test_48_seeds_try_every_target_at_every_moment():
    pairs = {(fault.target, fault.moment) for fault in map(fault_campaign.Fault.draw, range(1, 49))}
    assert len(pairs) == len(fault_campaign.DRAWN) * len(fault_campaign.MOMENTS)


@pytest.mark.parametrize("mode", fault_campaign.CHAINED)
def test_a_chain_follows_from_its_seed_and_hits_what_its_mode_replaces_at_every_moment(mode):
    strikes = kill_chain.draw(mode, 60, seed=1)
    assert strikes == kill_chain.draw(mode, 60, seed=1) != kill_chain.draw(mode, 60, seed=2)
    hit = {target for strike in strikes for target in strike.targets}
    assert hit == set(kill_chain.healable(mode)) and sum(len(strike.targets) for strike in strikes) >= 60
    is_separate = mode in fault_campaign.SEPARATE_MODES
    assert {strike.moment for strike in strikes} == set(fault_runs.METHODS) - (set() if is_separate else {"push"})
    pushes = {kill_chain.IN_PUSH, kill_chain.MISSED}
    assert {strike.pattern for strike in strikes} == set(kill_chain.ROUND) - (set() if is_separate else pushes)


def test_what_shares_its_processes_with_the_trainer_is_not_replaced():
    assert set(kill_chain.healable("stale_k")) == {"agent loop worker", "reward worker"}
    assert set(kill_chain.healable("bounded_async")) >= set(kill_chain.SERVERS)


@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.feature("resuming from a checkpoint", mode="stale_k_separate")
def test_nothing_is_lost_whatever_happens(tmp_path: Path):
    (fault,) = fault_campaign.run_all([6], tmp_path)
    assert fault.kind == "stale_k_separate" and fault.problems == []
    assert fault.recovered_after_s, "the restart trained on"
