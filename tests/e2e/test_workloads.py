"""What people train, in the staleness modes: real runs, small ones."""

import pytest
from mode_runs import UPDATES_PER_STEP, assert_every_place_was_trained_once, run_mode, versions_by_step

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FILTERED = ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=acc")


def assert_groups_without_advantage_were_replaced(result, ledger) -> None:
    """They were counted under verl's name and ours, and none of them was trained."""
    counted = result.series("staleness/evicted_uninformative")
    assert sum(counted) > 0 == sum(result.series("staleness/evicted_failed"))
    assert result.series("training/filter_groups/evicted_samples") == [count for count in counted if count]
    set_aside = [group[1] for line in ledger for group in line.get("set_aside", [])]
    trained = [group[1] for line in ledger for group in line["groups"]]
    assert set_aside and not set(set_aside) & set(trained)
    # Of two answers to a prompt that are scored 0 or 1, one is right in every group that is trained.
    assert result.series("critic/score/max") == [1.0] * len(counted)
    assert result.series("critic/score/min") == [0.0] * len(counted)


def test_dynamic_sampling_fills_each_batch_by_the_weights_that_it_is_owed(train, tmp_path):
    steps = 4
    result, ledger = run_mode(train, tmp_path, "stale_k", UPDATES_PER_STEP, *FILTERED, steps=steps)
    assert versions_by_step(ledger) == {step: {max(0, step - 2)} for step in range(1, steps + 1)}
    assert_every_place_was_trained_once(ledger, steps)
    assert_groups_without_advantage_were_replaced(result, ledger)
