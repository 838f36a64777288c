"""Processes of a run die and it goes on: the same command, to its last step, without a restart."""

from pathlib import Path

import pytest
from kill_chain import Chain
from kill_plan import IN_PUSH, IN_REPLACEMENT, MISSED, TWO, Strike

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

STEPS = 24


def test_processes_die_two_at_once_in_a_push_and_in_each_others_places_and_a_push_does_not_arrive(tmp_path: Path):
    """At the second kill of the engines none is left.

    So all wait for a new server, which joins with the weights that the trainer step still needs rollouts of.
    """
    strikes = [
        Strike(TWO, ("agent loop worker", "reward worker"), "generation", 0.2, (0.0, 0.0), 0.0),
        Strike(IN_PUSH, ("rollout server",), "push", 0.2, (0.0, 0.0), 0.0),
        # The one that is left, the older one, while the other one's successor loads its model.
        Strike(IN_REPLACEMENT, ("rollout engine", "rollout engine"), "generation", 0.1, (0.9, 0.0), 0.0),
        Strike(MISSED, (), "training", 0.0, (0.0, 0.0), 0.0),
    ]
    chain = Chain(tmp_path, "stale_k_separate", strikes, steps=STEPS, staleness_steps=1)
    chain.run()
    assert chain.problems == []
    assert chain.total("staleness/replicas_lost") >= 3
    assert chain.total("staleness/replicas_joined") >= 2
    assert chain.total("staleness/groups_moved") >= 1
    assert chain.total("staleness/lost_generation_s") > 0
    assert chain.step_metrics[0]["actor/m2po/mismatch_floor"] < 1e-9
