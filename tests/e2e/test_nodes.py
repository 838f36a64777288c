"""A machine joins a run, and is taken away: the run has one more rollout server meanwhile, and loses nothing."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import cpu_run
import psutil
import pytest
from fault_runs import HEAL_WITHIN_S, SEPARATE, START_WITHIN_S, TARGETS, Attempt, Kind, TrainingRun
from mode_runs import paced
from ray.cluster_utils import Cluster
from trained_rows import broken

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

STEPS = 36
NODE = {"object_store_memory": 256 * 2**20, "node_ip_address": "127.0.0.1"}
OF_A_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "_node_ip_address", "include_dashboard")
"""What a run says of a cluster of its own."""


class Machines:
    """Ray's cluster of this test: a machine with a trainer's device and a rollout's, and others that come and go."""

    def __init__(self) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 32, "num_gpus": 2, "include_dashboard": False, **NODE}
        )

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of a run that joins it."""
        section = "ray_kwargs.ray_init"
        return (f"{section}.address={self._cluster.address}", *(f"~{section}.{name}" for name in OF_A_CLUSTER))

    def join(self) -> psutil.Process:
        """One with one more device; Ray's daemon on it, from which all else there descends."""
        node = self._cluster.add_node(num_cpus=8, num_gpus=1, **NODE)
        (raylet,) = node.all_processes["raylet"]
        return psutil.Process(raylet.process.pid)

    def close(self) -> None:
        self._cluster.shutdown()


def take_away(raylet: psutil.Process) -> None:
    """`kill -9` of everything on a machine."""
    for process in (raylet, *raylet.children(recursive=True)):
        process.kill()


@pytest.fixture
def mark(monkeypatch) -> str:
    """Inherited by whatever Ray starts on the machines."""
    value = uuid.uuid4().hex
    for name, of in {cpu_run.MARK: value, SECONDS_PER_TOKEN: "0.06", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}.items():
        monkeypatch.setenv(name, of)
    return value


@pytest.fixture
def machines(mark) -> Iterator[Machines]:
    these = Machines()
    yield these
    these.close()


def test_a_machine_joins_and_is_killed_and_nothing_is_lost(tmp_path: Path, machines: Machines, mark: str):
    overrides = (
        *SEPARATE,
        *machines.overrides,
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "trainer.v1.bounded_async.max_replicas=2",
        *paced(tmp_path, lengths=[Lengths(1, median=16, sigma=0.5, longest=32)]),
        "data.max_response_length=32",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
    )
    run = TrainingRun(tmp_path, Kind("bounded_async", overrides=overrides), STEPS)
    attempt = Attempt(tmp_path, 1, run.command(), mark=mark)

    def replicas() -> float:
        steps = cpu_run.read_steps(attempt.metrics)
        return steps[-1]["data"]["staleness/replicas"] if steps else 0

    try:
        # The first server has its device: what joins from now on is for another one, which starts beside the rest.
        assert attempt.wait_for(lambda: bool(attempt.find(TARGETS["rollout engine"].titles)), START_WITHIN_S)
        raylet = machines.join()
        assert attempt.wait_for_steps(1, START_WITHIN_S), attempt.log.read_text()[-4000:]
        assert attempt.wait_for(lambda: replicas() == 2, HEAL_WITHIN_S), attempt.log.read_text()[-4000:]
        attempt.wait_for_moment("generation", 0.3)
        take_away(raylet)
        status = attempt.process.wait(timeout=600)
    finally:
        machines.close()  # they bear the mark of the run
        attempt.close()
    assert status == 0, attempt.log.read_text(errors="replace")[-4000:]
    assert not broken([[json.loads(line) for line in run.ledger.read_text().splitlines()]], run.promise())
    steps = [step["data"] for step in cpu_run.read_steps(attempt.metrics)]
    totals = {name: sum(step[f"staleness/{name}"] for step in steps) for name in ("replicas_joined", "replicas_lost")}
    assert totals == {"replicas_joined": 1, "replicas_lost": 1} and steps[-1]["staleness/replicas"] == 1
    assert sum(step["staleness/groups_moved"] for step in steps) >= 1, "the one that joined had been given work"
