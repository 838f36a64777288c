"""The runs that carry the claim through verl itself: real Ray, TransferQueue, FSDP2 and vLLM, in the mode `stale_k`.

Each goes on from its last checkpoint. They are smaller than those on the bench: with eight updates of two prompts a
trainer step, 256 updates are 32 steps, and the batches that the base model generates first take a minute.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pages import processor
from rich.console import Console

from benchmarks.paced import SECONDS_PER_TOKEN, SECONDS_PER_UPDATE
from staleness_study.run import RECORD, last_step
from verl_m2po.cli import quickstart
from verl_m2po.tasks import arithmetic

STEPS = 120
CHECKPOINT_EVERY = 20
SIZE = (
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "trainer.test_freq=10",
)
# Options of the Hydra groups ``loss`` and ``staleness``.
CLAIM = (("grpo", "on_policy"), ("m2po", "s256"), ("grpo", "s256"), ("no_trust_region", "s256"))
# Separate devices, where the generation of one batch overlaps the training of another, against sync.
WALL_CLOCK = (("grpo", "on_policy"), ("m2po", "s256_separate"), ("m2po", "s16_separate"))
# Both processes of such a run share the cores of a small machine, where nothing can be won by overlapping. So in the
# comparison of times most of the time of a token and of an update is slept, about as much in all for either part.
TOKEN_S, UPDATE_S = 0.4, 0.3
PACED = (
    # The engine is full with one batch of 16 x 8: more in flight do not come for nothing.
    "actor_rollout_ref.rollout.max_num_seqs=128",
    "actor_rollout_ref.actor.optim.optimizer_impl=benchmarks.paced.optimizer",
    "actor_rollout_ref.actor.optim.optimizer=PacedAdamW",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
    "trainer.test_freq=5",
)


@dataclass(frozen=True)
class VerlRun(quickstart.Run):
    """A run of the quickstart's kind at one staleness, which goes on from its last checkpoint.

    Args:
        staleness: Option of the Hydra group ``staleness``.
        attempt: Number of this call, from 1; each has a log of its own, since verl's logger replaces its file.
        is_paced: A token takes `TOKEN_S` and an update `UPDATE_S` longer.
    """

    staleness: str = "on_policy"
    attempt: int = 1
    is_paced: bool = False

    @property
    def name(self) -> str:
        return f"{self.loss}-{self.staleness}-seed{self.seed}"

    @property
    def metrics(self) -> Path:
        return self.folder / f"attempt-{self.attempt}.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        pace = {SECONDS_PER_TOKEN: str(TOKEN_S), SECONDS_PER_UPDATE: str(UPDATE_S)} if self.is_paced else {}
        return super().environment | pace

    @classmethod
    def next_attempt(
        cls, out: Path, loss: str, staleness: str, seed: int, steps: int, is_paced: bool = False
    ) -> "VerlRun":
        """The run with the number of the next attempt."""
        overrides = (
            *SIZE,
            *(PACED if is_paced else ()),
            f"staleness={staleness}",
            f"trainer.save_freq={CHECKPOINT_EVERY}",
            "trainer.max_actor_ckpt_to_keep=1",
            "trainer.resume_mode=auto",
            "trainer.logger=[file]",
            "ray_kwargs.ray_init.address=local",
        )
        run = cls(out, steps, loss, seed, overrides, staleness)
        made = [
            int(match[1]) for path in run.folder.glob("*.jsonl") if (match := re.match(r"attempt-(\d+)", path.name))
        ]
        folder = f"trainer.default_local_dir={run.folder / 'checkpoints'}"
        attempt = max(made, default=0) + 1
        return cls(out, steps, loss, seed, (*overrides, folder), staleness, attempt, is_paced)

    def command(self, model: Path, data: Path) -> list[str]:
        """The command that trains: the quickstart's with the study's config."""
        return [
            word.replace("--config-name=arithmetic", "--config-name=arithmetic_staleness")
            for word in super().command(model, data)
        ]


def run_verl(
    out: Path,
    console: Console,
    conditions: Sequence[tuple[str, str]],
    seeds: Sequence[int],
    steps: int = STEPS,
    is_paced: bool = False,
) -> list[str]:
    """Train what is not finished, one run at a time; return a line for each that failed.

    Args:
        out: Folder of the runs.
        console: Where progress is shown.
        conditions: (option of ``loss``, option of ``staleness``).
        seeds: All conditions with the first seed first.
        steps: Trainer steps.
        is_paced: See `VerlRun`.
    """
    from verl_m2po.one_process import train
    from verl_m2po.one_process.setup import RECIPE, base_model

    model, data = base_model(), out / "data"
    arithmetic.write_parquet(data, train_rows=quickstart.TRAINING_ROWS, validation_rows=256, digits=RECIPE.digits)
    failed = []
    for seed in seeds:
        for loss, staleness in conditions:
            run = VerlRun.next_attempt(out, loss, staleness, seed, steps, is_paced)
            if any(last_step(log) >= steps for log in run.folder.glob("attempt-*.jsonl")):
                continue
            console.print(f"{run.name}, attempt {run.attempt}")
            command = run.command(model.absolute(), data.absolute())
            run.folder.mkdir(parents=True, exist_ok=True)
            record = {"command": command, "versions": train.versions(), "machine": processor()}
            (run.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            if status := quickstart.train(run, command, console):
                failed.append(f"{run.name}: exit status {status}, see {run.folder / 'console.log'}")
    return failed
