"""Rollout servers die and the run goes on: the same command, to its last step, without a restart."""

from pathlib import Path

import cpu_run
import fault_campaign
import pytest
from mode_runs import paced
from trained_rows import broken

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths
from verl_m2po.staleness.account.ledger import read_ledger

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS, STALE_STEPS, LONGEST = 9, 1, 32


def test_engines_die_until_none_is_left_and_an_agent_loop_worker_and_others_take_their_places(
    tmp_path: Path, monkeypatch
):
    """In the midst of generation. The first death leaves one server, which takes over; the second one none.

    So all wait for a new server, which joins with the weights that the trainer step still needs rollouts of.
    """
    monkeypatch.setenv(SECONDS_PER_TOKEN, "0.06")
    overrides = (
        *fault_campaign.SEPARATE,
        "actor_rollout_ref.rollout.n_gpus_per_node=2",
        *paced(tmp_path, lengths=[Lengths(1, median=16, sigma=0.5, longest=LONGEST)]),
        f"data.max_response_length={LONGEST}",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
    )
    kind = fault_campaign.Kind("stale_k_separate", STALE_STEPS, overrides=overrides)
    run = fault_campaign.Campaign(tmp_path, [], kind=kind, steps=STEPS)
    attempt = fault_campaign.Attempt(tmp_path, 1, run.command())
    try:
        for steps, target in ((2, "rollout engine"), (4, "rollout engine"), (6, "agent loop worker")):
            assert attempt.wait_for_steps(steps, fault_campaign.START_WITHIN_S), attempt.log.read_text()[-4000:]
            processes = attempt.find(fault_campaign.TARGETS[target].titles)
            min(processes, key=lambda process: process.create_time()).kill()
        status = attempt.end(within_s=600)
    finally:
        attempt.close()
    output = attempt.log.read_text(errors="replace")
    assert status == 0, output[-4000:]
    ledger = [line for line in read_ledger(run.ledger) if "step" in line]
    assert not broken([ledger], run.promise())
    steps = [step["data"] for step in cpu_run.read_steps(attempt.metrics)]
    assert sum(step["staleness/replicas_lost"] for step in steps) == 2
    assert sum(step["staleness/replicas_joined"] for step in steps) >= 1
    assert sum(step["staleness/groups_moved"] for step in steps) >= 1
    assert sum(step["staleness/lost_generation_s"] for step in steps) > 0
    assert sum(step["staleness/poisoned"] for step in steps) == 0
    assert max(step["actor/m2po/mismatch_floor"] for step in steps[:1]) < 1e-9
