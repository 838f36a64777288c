"""Real training runs whose processes can be found and killed: what is run, what may be hit, what was promised."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cpu_run
import failing_rewards
import psutil
import torch
from torchdata.stateful_dataloader.sampler import RandomSampler
from trained_rows import Promise

from verl_m2po.tasks import arithmetic, tiny_model

BATCH, MINI_BATCH, RESPONSES, STALENESS_STEPS, SAVE_EVERY = 8, 4, 4, 2, 2
PROMPTS, DATA_SEED = 512, 1

START_WITHIN_S, STEP_WITHIN_S = 600.0, 120.0

HEAL_WITHIN_S = 300.0
"""A run that heals must have gone on after that."""

SEPARATE = ("actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.nnodes=1")


@dataclass(frozen=True)
class Kind:
    """A kind of training run.

    Args:
        mode: trainer mode.
        staleness_steps: trainer steps; exact, or the bound.
        has_journal: whether what was generated outlives a crash.
        masks: whether a trajectory of every tenth prompt fails, and is masked.
        overrides: further ones.
    """

    mode: str
    staleness_steps: int = STALENESS_STEPS
    has_journal: bool = False
    masks: bool = False
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What is hit.

    Args:
        titles: how Ray and vLLM title its process; "" is every process of the run.
        words: one of them must stand in an error; none where nobody is left to say anything.
        send: other than SIGKILL, it goes to the driver's process group, as terminals and batch systems send it.
        heals_in: trainer modes that go on without a restart once they train.
        heals_at_start: and before that.
    """

    titles: tuple[str, ...]
    words: tuple[str, ...] = ()
    send: signal.Signals = signal.SIGKILL
    heals_in: tuple[str, ...] = ()
    heals_at_start: bool = False

    @property
    def asks(self) -> bool:
        """Whether the run is asked to end, and may save a checkpoint first."""
        return self.send != signal.SIGKILL


SEPARATE_MODES = ("stale_k_separate", "bounded_async")

TARGETS = {
    "rollout engine": Target(
        ("VLLM::EngineCore",), ("EngineCore", "EngineDead", "rollout server"), heals_in=SEPARATE_MODES
    ),
    "actor worker": Target(("ray::WorkerDict",), ("actor worker", "WorkerDict")),
    "agent loop worker": Target(
        ("ray::StalenessAgent", "ray::AgentLoop"),
        ("agent loop worker", "AgentLoopWorker"),
        heals_in=("stale_k", *SEPARATE_MODES),
    ),
    "TransferQueue storage": Target(("ray::SimpleStorageUnit",), ("TransferQueue storage", "SimpleStorageUnit")),
    "rollout server": Target(("ray::vLLMHttpServer",), ("rollout server", "vLLMHttpServer"), heals_in=SEPARATE_MODES),
    "all processes": Target(("",)),
    "SIGTERM": Target(("main_ppo",), send=signal.SIGTERM),
    "reward worker": Target(
        ("ray::RestartableRewardLoopWorker", "ray::RewardLoopWorker"),
        ("reward worker", "RewardLoopWorker"),
        heals_in=("stale_k", *SEPARATE_MODES),
        heals_at_start=True,
    ),
    "TransferQueue controller": Target(
        ("ray::TransferQueueController",), ("TransferQueue controller", "QueueController")
    ),
    "trainer": Target(("ray::TaskRunner",), ("TaskRunner",)),
    "Ctrl-C": Target(("main_ppo",), send=signal.SIGINT),
    "driver": Target(("main_ppo",)),
    "rollout worker": Target(("ray::CheckpointEngineWorker",), ("rollout worker",), heals_in=SEPARATE_MODES),
}

METHODS = {"generation": "", "training": "update_actor", "saving": "save_checkpoint", "push": "update_weights"}
"""In the midst of what, by the method that the actor worker's title shows; "": none, while generation is waited for."""


@dataclass(frozen=True)
class TrainingRun:
    """One training run of a kind, however often it is started.

    Args:
        folder: of everything that it writes.
        kind: what is run.
        steps: trainer steps.
    """

    folder: Path
    kind: Kind
    steps: int

    @property
    def prompts(self) -> int:
        """In its data set."""
        return max(PROMPTS, (self.steps + 2 * STALENESS_STEPS) * BATCH)

    @property
    def ledger(self) -> Path:
        """Of all attempts."""
        return self.folder / "ledger.jsonl"

    @property
    def journal(self) -> Path:
        """Where the kind has one."""
        return self.folder / "journal"

    def command(self) -> list[str]:
        """That of every attempt."""
        data = self.folder / "data"
        arithmetic.write_parquet(data, train_rows=self.prompts, validation_rows=8)
        mode = f"trainer.v1.{self.kind.mode}"
        return [
            sys.executable,
            "-m",
            "verl.trainer.main_ppo",
            "--config-name=arithmetic",
            "hardware=cpu",
            "ray_kwargs.ray_init.address=local",
            f"actor_rollout_ref.model.path={tiny_model.build()}",
            f"data.train_files={data / 'train.parquet'}",
            f"data.val_files={data / 'validation.parquet'}",
            f"data.seed={DATA_SEED}",
            f"data.train_batch_size={BATCH}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI_BATCH}",
            f"actor_rollout_ref.rollout.n={RESPONSES}",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            f"trainer.total_training_steps={self.steps}",
            f"trainer.v1.trainer_mode={self.kind.mode}",
            f"{mode}.staleness_updates={self.kind.staleness_steps * BATCH // MINI_BATCH}",
            f"{mode}.ledger_path={self.ledger}",
            f"{mode}.journal={str(self.kind.has_journal).lower()}",
            f"{mode}.journal_path={self.journal}",
            *(self._failing_rewards(mode) if self.kind.masks else ()),
            f"trainer.save_freq={SAVE_EVERY}",
            "trainer.resume_mode=auto",
            f"trainer.default_local_dir={self.folder / 'checkpoints'}",
            *self.kind.overrides,
        ]

    @staticmethod
    def _failing_rewards(mode: str) -> tuple[str, ...]:
        function = failing_rewards.compute_score_failing_once
        return (
            f"reward.custom_reward_function.path={failing_rewards.__file__}",
            f"reward.custom_reward_function.name={function.__name__}",
            f"{mode}.on_failed_trajectory=mask",
        )

    def promise(self) -> Promise:
        """What it trains on when nothing happens to it."""
        order = list(RandomSampler(range(self.prompts), generator=torch.Generator().manual_seed(DATA_SEED)))
        masked = frozenset(filter(failing_rewards.fails_once, order)) if self.kind.masks else frozenset()
        return Promise(self.kind.mode, self.kind.staleness_steps, self.steps, BATCH, RESPONSES, order, masked)


class Attempt:
    """One start of the run's command.

    Args:
        folder: for its log and metrics.
        number: of the attempt, from 1.
        command: see `TrainingRun.command`.
        environment: further variables.
        mark: the value of `cpu_run.MARK` by which its processes are found; None draws one.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        command: list[str],
        environment: dict[str, str] | None = None,
        mark: str | None = None,
    ) -> None:
        _wait_for_memory()
        self.mark = mark or uuid.uuid4().hex
        self.metrics = folder / f"attempt-{number}.jsonl"
        self.log = folder / f"attempt-{number}.txt"
        self.began_at = time.monotonic()
        self.first_step_s: float | None = None
        self._stream = self.log.open("w")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self._stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                **(environment or {}),
                cpu_run.MARK: self.mark,
                "VERL_FILE_LOGGER_PATH": str(self.metrics),
                "TENSORBOARD_DIR": str(folder / "tensorboard"),
            },
        )

    @property
    def steps(self) -> int:
        """Trainer steps that it has logged."""
        return len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0

    @property
    def last_step(self) -> int:
        """The last trainer step that it has logged, 0 for none."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def find(self, titles: tuple[str, ...]) -> list[psutil.Process]:
        return [p for p in cpu_run.marked(self.mark) if any(title in title_of(p) for title in titles)]

    def wait_for(self, what: Callable[[], bool], within_s: float, every_s: float = 0.2) -> bool:
        """Whether it happened before the time was over or the run ended."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            if what():
                return True
            time.sleep(every_s)
        return False

    def wait_for_steps(self, steps: int, within_s: float) -> bool:
        """Wait until it has logged that many; notes when the first one came."""
        if self.first_step_s is None and self.wait_for(lambda: self.steps > 0, within_s):
            self.first_step_s = round(time.monotonic() - self.began_at, 1)
        return self.wait_for(lambda: self.steps >= steps, within_s)

    def wait_for_moment(self, moment: str, delay_s: float) -> None:
        """Wait until the actor is in the midst of `moment`, one of `METHODS`, and part of `delay_s` longer."""
        workers, method = self.find(("ray::WorkerDict",)), METHODS[moment]

        def is_now() -> bool:
            titles = [title_of(worker) for worker in workers]
            return any(method in title if method else "." not in title for title in titles)

        self.wait_for(is_now, STEP_WITHIN_S, every_s=0.005)
        time.sleep(delay_s * (0.4 if method else 1.0))

    def end(self, within_s: float) -> int | None:
        """Its exit status; None if it had to be killed."""
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.close()

    def close(self) -> None:
        cpu_run.kill_marked(self.mark, grace_s=20 if self.process.poll() is not None else 0)
        self.process.wait()
        self._stream.close()


def _wait_for_memory() -> None:
    """The preflight refuses a run without 8 GiB, and what was killed before may not have given its memory back."""
    deadline = time.monotonic() + START_WITHIN_S
    while psutil.virtual_memory().available < 9 * 2**30 and time.monotonic() < deadline:
        time.sleep(1.0)


def title_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
