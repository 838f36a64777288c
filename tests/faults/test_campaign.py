"""Faults on a real run: a rollout server, which is replaced, and SIGTERM. `make faults` tries more kinds of both."""

from pathlib import Path

import fault_campaign
import pytest


@pytest.mark.parametrize(("text", "seeds"), [("3", [3]), ("1-4", [1, 2, 3, 4]), ("1,4-5,9", [1, 4, 5, 9])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    assert fault_campaign.parse_seeds(text) == seeds


@pytest.mark.parametrize("row", [0, 1, 2])
def test_twelve_seeds_cover_targets_kinds_and_moments(row):
    seeds = range(1 + 12 * row, 13 + 12 * row)
    faults = [fault_campaign.Fault.draw(seed) for seed in seeds]
    assert {fault.target for fault in faults} == set(fault_campaign.TARGETS)
    assert {fault.kind for fault in faults} == set(fault_campaign.KINDS[row])
    assert {fault.moment for fault in faults} == set(fault_campaign.MOMENTS)
    assert faults == [fault_campaign.Fault.draw(seed) for seed in seeds]


def test_48_seeds_try_every_target_at_every_moment():
    pairs = {(fault.target, fault.moment) for fault in map(fault_campaign.Fault.draw, range(1, 49))}
    assert len(pairs) == len(fault_campaign.TARGETS) * len(fault_campaign.MOMENTS)


def test_a_chain_kills_only_what_its_mode_replaces():
    faults = fault_campaign.chain("bounded_async", 30, seed=1)
    assert len(faults) == 30 and faults == fault_campaign.chain("bounded_async", 30, seed=1)
    assert {fault.target for fault in faults} == {"rollout engine", "rollout server", "agent loop worker"}
    assert "start" not in {fault.moment for fault in faults}


@pytest.mark.e2e
@pytest.mark.timeout(1500)
@pytest.mark.feature("resuming from a checkpoint", mode="stale_k_separate")
def test_nothing_is_lost_whatever_happens(tmp_path: Path):
    faults = fault_campaign.run_all([4, 6], tmp_path)
    assert {fault.kind for fault in faults} == {"stale_k_separate"}
    assert [fault.problems for fault in faults] == [[], []]
    assert [fault.has_healed for fault in faults] == [True, False]
    assert faults[-1].recovered_after_s, "the last restart trained on"
