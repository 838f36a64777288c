"""An agent loop that returns several trajectories for a session: verl makes more optimizer updates of them."""

from collections import defaultdict

import pytest
import twice_agent_loop

from verl_m2po.staleness.account.ledger import read_ledger, surviving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIGURED_UPDATES, REAL_UPDATES = 2, 4  # per trainer step


@pytest.fixture
def twice(tmp_path) -> tuple[str, str]:
    path = tmp_path / "agent_loop.yaml"
    twice_agent_loop.write_config(str(path))
    agent = "actor_rollout_ref.rollout.agent"
    return f"{agent}.agent_loop_config_path={path}", f"{agent}.default_agent_loop={twice_agent_loop.NAME}"


def test_an_exact_age_that_cannot_be_kept_ends_the_run_and_is_the_last_thing_said(train, twice):
    result = train(
        "trainer.total_training_steps=4",
        "trainer.v1.trainer_mode=stale_k",
        f"trainer.v1.stale_k.staleness_updates={CONFIGURED_UPDATES}",
        *twice,
        status=1,
    )
    assert not result.steps, "nothing was trained at an age that is not what was asked for"
    # What the run is comes after verl's dump of its configuration, and the error is repeated at the very end.
    dump, summary = result.output.rindex("'total_training_steps'"), result.output.rindex("verl-m2po: this run")
    assert dump < summary < result.output.index("would make 4 optimizer updates of 64 rows")
    what, why = result.output.rpartition("verl-m2po: the run failed\n")[-1].splitlines()
    assert "ended with an error" in what and "StalenessViolation: trainer step 1 would make 4 optimizer updates" in why


@pytest.mark.workload
def test_a_bound_counts_the_updates_that_are_really_made(train, twice, tmp_path):
    ledger = tmp_path / "ledger.jsonl"
    result = train(
        "trainer.total_training_steps=6",
        "trainer.v1.trainer_mode=bounded_async",
        f"trainer.v1.bounded_async.staleness_updates={2 * REAL_UPDATES}",
        f"trainer.v1.bounded_async.ledger_path={ledger}",
        "actor_rollout_ref.hybrid_engine=false",
        "actor_rollout_ref.rollout.nnodes=1",
        *twice,
    )
    rows_of: dict[int, list] = defaultdict(list)
    behind: dict[int, int] = defaultdict(int)
    for line in surviving(read_ledger(ledger)):
        rows = [row for group in line["groups"] for row in group[3]]
        rows_of[line["step"]] += rows
        behind[line["step"]] = max(behind[line["step"]], *(line["version"] - row[1][0][0] for row in rows))
    assert [len(rows) for rows in rows_of.values()] == [8 * 4 * 2] * 6, "both trajectories of each session"
    steps_behind = list(behind.values())
    assert result.series("staleness/age_updates_max") == [REAL_UPDATES * steps for steps in steps_behind]
    assert 0 < max(steps_behind) <= 2
