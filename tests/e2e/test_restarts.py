"""A run that loses what cannot be replaced goes on by itself, in the same process, and trains what it would have."""

import time
from pathlib import Path

import cpu_run
import fault_runs
import pytest
from trained_rows import broken

from verl_m2po.staleness.account.ledger import read_ledger, surviving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS, STALE_STEPS = 6, 1


def test_the_death_of_an_actor_worker_costs_a_restart_of_the_command_and_no_more(tmp_path: Path):
    """Without a journal: what waited in the buffer is generated again, by weights of the same version."""
    kind = fault_runs.Kind("stale_k", STALE_STEPS, overrides=("trainer.v1.stale_k.restarts=1",))
    run = fault_runs.TrainingRun(tmp_path, kind, STEPS)
    attempt = fault_runs.Attempt(tmp_path, 1, run.command())
    try:
        assert attempt.wait_for_steps(3, fault_runs.START_WITHIN_S)
        for worker in attempt.find(("ray::WorkerDict",)):
            worker.kill()
        began_at = time.monotonic()
        status = attempt.end(within_s=600)
    finally:
        attempt.close()
    output = attempt.log.read_text(errors="replace")
    assert status == 0, output[-4000:]
    assert time.monotonic() - began_at < 600
    assert output.count("verl-m2po: the run failed") == 1 and "restart 1 of 1: the run failed at trainer step" in output
    # verl's log of the attempt before lies beside the new one.
    earlier = cpu_run.read_steps(attempt.metrics.with_name(f"{attempt.metrics.stem}.attempt-1.jsonl"))
    later = cpu_run.read_steps(attempt.metrics)
    assert earlier[-1]["step"] >= 3 and later[-1]["step"] == STEPS
    assert broken([surviving(read_ledger(run.ledger))], run.promise()) == []
