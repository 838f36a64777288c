# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# Ray's own of what it does not export, and its keyword arguments of a node.
"""Machines join a run and are taken away, one by `kill -9`, one after Ray was told to drain it: nothing is lost.

    make faults

Each machine is a node of Ray's own cluster on this one (`ray.cluster_utils.Cluster`), with one more device.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from unittest import mock

import cpu_run
import psutil
import ray
from fault_runs import HEAL_WITHIN_S, SEPARATE, START_WITHIN_S, STEP_WITHIN_S, Attempt, Kind, TrainingRun
from mode_runs import paced
from ray.cluster_utils import Cluster
from trained_rows import broken

from benchmarks.paced import SECONDS_PER_TOKEN
from benchmarks.paced.agent_loop import Lengths

STEPS = 120
LONGEST_TOKENS = 32
REQUESTS_AT_ONCE = 8
"""That an engine generates together: a quarter of a batch, so that a second engine halves the time of generation."""

SETTLED_STEPS = 4
"""So many trainer steps are timed with each number of servers."""

MEMORY = {"object_store_memory": 256 * 2**20}
OF_A_CLUSTER = ("num_cpus", "num_gpus", "object_store_memory", "_node_ip_address", "include_dashboard")
"""What a run says of a cluster of its own."""

PREEMPTION = 2
"""Ray's `DrainNodeReason`: a spot notice."""


class Machines:
    """A machine with a trainer's device and a rollout's, and others that come and go."""

    def __init__(self) -> None:
        head = {"num_cpus": 32, "num_gpus": 2, "include_dashboard": False, **MEMORY}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of a run that joins the cluster."""
        section = "ray_kwargs.ray_init"
        return (f"{section}.address={self._cluster.address}", *(f"~{section}.{name}" for name in OF_A_CLUSTER))

    def join(self):
        """One with one more device."""
        return self._cluster.add_node(num_cpus=8, num_gpus=1, **MEMORY)

    @staticmethod
    def take_away(node) -> None:
        """`kill -9` of everything on it: all descends from Ray's daemon there."""
        (raylet,) = node.all_processes["raylet"]
        daemon = psutil.Process(raylet.process.pid)
        for process in (daemon, *daemon.children(recursive=True)):
            process.kill()

    def drain(self, node) -> None:
        """Say that it will be taken away."""
        gcs = ray._raylet.GcsClient(address=self._cluster.address)
        gcs.drain_node(node.node_id, PREEMPTION, "a spot notice", 0)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def machines(folder: Path, mark: str) -> Iterator[Machines]:
    """What these variables say is inherited by whatever Ray starts on the machines, a trainer too."""
    variables = {
        cpu_run.MARK: mark,
        SECONDS_PER_TOKEN: "0.06",
        "VERL_FILE_LOGGER_PATH": str(folder / "attempt-1.jsonl"),
        "TENSORBOARD_DIR": str(folder / "tensorboard"),
    }
    with mock.patch.dict(os.environ, variables):
        these = Machines()
        try:
            yield these
        finally:
            these.close()


@dataclass
class Visits:
    """One training run in `bounded_async` that two machines visit, one after the other.

    Args:
        folder: of everything that it writes.
        say: told of what happens.
        seconds_per_step: trainer steps by the number of servers.
    """

    folder: Path
    say: Callable[[str], None] = print
    seconds_per_step: dict[int, float] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Join, kill, join, drain, and judge; fills in the rest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = uuid.uuid4().hex
        with machines(self.folder, mark) as these:
            overrides = (*SEPARATE, *these.overrides, *self._pace_and_size())
            training = TrainingRun(self.folder, Kind("bounded_async", overrides=overrides), STEPS)
            self.attempt = Attempt(self.folder, 1, training.command(), mark=mark)
            try:
                self._visit(these)
                status = None if self.problems else self.attempt.process.wait(STEPS * STEP_WITHIN_S)
            finally:
                # Its processes bear the mark of the run, which ends them all.
                these.close()
                self.attempt.close()
        self._judge(status, training)

    def _pace_and_size(self) -> tuple[str, ...]:
        processors = "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors"
        return (
            "actor_rollout_ref.rollout.n_gpus_per_node=1",
            f"actor_rollout_ref.rollout.max_num_seqs={REQUESTS_AT_ONCE}",
            "trainer.v1.bounded_async.max_replicas=2",
            *paced(self.folder, lengths=[Lengths(1, median=16, sigma=0.5, longest=LONGEST_TOKENS)]),
            f"data.max_response_length={LONGEST_TOKENS}",
            "trainer.max_actor_ckpt_to_keep=1",
            f"{processors}=benchmarks.paced.token_time:TokenTime",
        )

    def _visit(self, these: Machines) -> None:
        if not self.attempt.wait_for_steps(SETTLED_STEPS, START_WITHIN_S):
            self.problems.append("the run does not begin")
            return
        for how in ("kill -9", "drained"):
            node = these.join()
            if not self._wait_for_servers(2):
                return
            self._say(f"a machine has joined; it will be {how}")
            self._see_steps(SETTLED_STEPS + 1)
            self.attempt.wait_for_moment("generation", 0.3)
            if how == "drained":
                these.drain(node)
                if not self._wait_for_servers(1):
                    return
                self._say("its server has been left")
            these.take_away(node)
            self._see_steps(SETTLED_STEPS)

    def _say(self, what: str) -> None:
        self.say(f"machines, step {self.attempt.last_step}: {what}")

    def _servers(self) -> float:
        steps = cpu_run.read_steps(self.attempt.metrics)
        return steps[-1]["data"]["staleness/replicas"] if steps else 0

    def _wait_for_servers(self, count: int) -> bool:
        if self.attempt.wait_for(lambda: self._servers() == count, HEAL_WITHIN_S):
            return True
        self.problems.append(
            f"{self._servers():.0f} servers instead of {count} at trainer step {self.attempt.last_step}"
        )
        return False

    def _see_steps(self, count: int) -> None:
        enough = self.attempt.last_step + count
        self.attempt.wait_for(lambda: self.attempt.last_step >= enough, HEAL_WITHIN_S)

    def report(self) -> str:
        """In a line."""
        pace = f"median seconds of a trainer step by the number of servers: {self.seconds_per_step}"
        return f"machines: {self.problems or 'nothing lost'}; {self.totals}; {pace}"

    def _judge(self, status: int | None, training: TrainingRun) -> None:
        output = self.attempt.log.read_text(errors="replace")
        if status != 0:
            self.problems.append(f"the run ended with status {status}:\n" + "\n".join(output.splitlines()[-40:]))
        lines = training.ledger.read_text().splitlines() if training.ledger.exists() else []
        self.problems += broken([[json.loads(line) for line in lines]], training.promise())
        steps = [step["data"] for step in cpu_run.read_steps(self.attempt.metrics)]
        names = ("replicas_joined", "replicas_lost", "groups_moved")
        self.totals = {name: sum(step[f"staleness/{name}"] for step in steps) for name in names}
        if self.totals["replicas_joined"] != 2 or self.totals["groups_moved"] < 1:
            self.problems.append(f"two servers that get work should have joined: {self.totals}")
        self.seconds_per_step = _seconds_per_step(steps)
        if not self.seconds_per_step.get(2, 0) < self.seconds_per_step.get(1, 0):
            self.problems.append(f"generation got no faster, seconds of a step by servers: {self.seconds_per_step}")


def _seconds_per_step(steps: list[dict]) -> dict[int, float]:
    """The median by the number of servers; a step counts if the one before had as many."""
    found: dict[int, list[float]] = {}
    for before, step in pairwise(steps):
        if before["staleness/replicas"] == step["staleness/replicas"]:
            found.setdefault(int(step["staleness/replicas"]), []).append(step["timing_s/step"])
    return {servers: round(median(seconds), 2) for servers, seconds in found.items()}
