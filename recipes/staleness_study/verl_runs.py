"""The study's runs through verl itself: real Ray, TransferQueue, FSDP2 and vLLM, each from its last checkpoint on.

They are smaller than those on the bench: with eight updates of two prompts a trainer step, 256 updates are 32 steps,
and the batches that the base model generates first take a minute.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from pages import processor
from rich.console import Console

from benchmarks.paced import SECONDS_PER_TOKEN, SECONDS_PER_UPDATE
from staleness_study import exact, plan
from staleness_study.run import RECORD, last_step
from verl_m2po.cli import quickstart
from verl_m2po.ground.overrides import override
from verl_m2po.one_process.setup import CONFIG, RECIPE
from verl_m2po.tasks import arithmetic, tiny_model

STEPS = 120
CHECKPOINT_EVERY = 20
SIZE = (
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "trainer.test_freq=10",
)


class Condition(NamedTuple):
    """Options of the Hydra groups ``loss``, ``staleness`` and ``replay``; an empty one is left out."""

    loss: str
    staleness: str
    replay: str = ""

    @property
    def bounds(self) -> tuple[str, ...]:
        """Overrides that say how old what is trained may be, where the option of ``staleness`` does not."""
        if self.staleness != "bounded_async":
            return ()
        bound = "trainer.v1.bounded_async"
        if not self.replay:
            return (f"{bound}.staleness_updates={AHEAD}",)
        return (f"replay={self.replay}", f"{bound}.staleness_updates={REPLAY_WINDOW}", f"{bound}.ahead_updates={AHEAD}")


@dataclass(frozen=True)
class Pace:
    """How long a token and an update take, in seconds, most of it slept.

    Both processes of a run share the cores of a small machine, where nothing can be won by overlapping. So in a
    comparison of times most of them is slept.
    """

    token_s: float
    update_s: float


# In the mode `stale_k`, and on-policy in `sync`
CLAIM = (
    *(Condition("grpo", "on_policy"), Condition("m2po", "s256")),
    *(Condition("grpo", "s256"), Condition("no_trust_region", "s256")),
)
# At a learning rate at which methods differ within `STEPS`
HOT = (
    *(Condition("m2po_tapered", "s256"), Condition("grpo", "s256")),
    *(Condition("grpo", "on_policy"), Condition("m2po", "s256")),
)
HOT_OVERRIDES = (f"actor_rollout_ref.actor.optim.lr={plan.HOT_RATE}",)
# Separate devices, where the generation of one batch overlaps the training of another, against sync
WALL_CLOCK = (Condition("grpo", "on_policy"), Condition("m2po", "s256_separate"), Condition("m2po", "s16_separate"))
# About as much in all for either part
EVEN = Pace(0.4, 0.3)
# Replay instead of waiting, against waiting and against sync
REPLAY_CLOCK = (
    *(Condition("grpo", "on_policy"), Condition("m2po", "bounded_async")),
    Condition("m2po", "bounded_async", "x4"),
)
# Generation takes three times as long as a trainer step without it: eight times four tokens against four updates and
# what a step of verl takes on a small machine beside them, about 1.5 s. Tokens are short, since weights are pushed
# between two of them: at 2 s a token a push took 8 s.
SLOW_GENERATION = Pace(0.27, 0.35)
# Optimizer updates: how far generation may run ahead, and how old a rollout may be when it is trained again
AHEAD, REPLAY_WINDOW = 8, 128
# Two-digit addition, which so few steps make a difference to
REPLAY_CONFIG, REPLAY_RECIPE, REPLAY_CLOCK_STEPS = "arithmetic", tiny_model.Recipe(), 100
REPLAY_TIMED = (
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    # At the config's 3e-4 batches of half its size learn less.
    "actor_rollout_ref.actor.optim.lr=1e-4",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    # An eighth of a batch at a time
    "actor_rollout_ref.rollout.max_num_seqs=16",
    # Not validated: at this pace that would take longer than a step, and its sampling is noise. Each checkpoint is
    # measured when the run is over.
    *("trainer.test_freq=-1", "trainer.val_before_train=false"),
    *("trainer.save_freq=10", "trainer.max_actor_ckpt_to_keep=null", exact.WITH_MODEL),
)
# Trainer steps of a run with replay for each of one without: it waits for a quarter of the rollouts
REPLAY_STEPS = 2
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
        condition: What it trains with.
        attempt: Number of this call, from 1; each has a log of its own, since verl's logger replaces its file.
        pace: None: as fast as the machine is.
        config: verl's primary config.
    """

    condition: Condition = CLAIM[0]
    attempt: int = 1
    pace: Pace | None = None
    config: str = CONFIG

    @property
    def name(self) -> str:
        return "-".join((*filter(None, self.condition), f"seed{self.seed}"))

    @property
    def metrics(self) -> Path:
        return self.folder / f"attempt-{self.attempt}.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        pace = self.pace
        times = {} if pace is None else {SECONDS_PER_TOKEN: str(pace.token_s), SECONDS_PER_UPDATE: str(pace.update_s)}
        return super().environment | times

    @classmethod
    def next_attempt(
        cls,
        out: Path,
        condition: Condition,
        seed: int,
        steps: int,
        pace: Pace | None = None,
        more: tuple[str, ...] = (),
        config: str = CONFIG,
    ) -> "VerlRun":
        """The run with the number of the next attempt."""
        overrides = (
            *SIZE,
            *(() if pace is None else PACED),
            f"staleness={condition.staleness}",
            *condition.bounds,
            f"trainer.save_freq={CHECKPOINT_EVERY}",
            "trainer.max_actor_ckpt_to_keep=1",
            "trainer.resume_mode=auto",
            "trainer.logger=[file]",
            "ray_kwargs.ray_init.address=local",
            *more,
        )
        run = cls(out, steps, condition.loss, seed, overrides, condition, pace=pace, config=config)
        made = [
            int(match[1]) for path in run.folder.glob("*.jsonl") if (match := re.match(r"attempt-(\d+)", path.name))
        ]
        folder = override("trainer.default_local_dir", run.folder / "checkpoints")
        return replace(run, overrides=(*overrides, folder), attempt=max(made, default=0) + 1)

    def command(self, model: Path, data: Path) -> list[str]:
        """The command that trains: the quickstart's with another config."""
        return [
            word.replace("--config-name=arithmetic", f"--config-name={self.config}")
            for word in super().command(model, data)
        ]


def run_verl(
    out: Path,
    console: Console,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    steps: int = STEPS,
    pace: Pace | None = None,
    more: tuple[str, ...] = (),
    config: str = CONFIG,
    recipe: tiny_model.Recipe = RECIPE,
    measured: bool = False,
) -> list[str]:
    """Train what is not finished, one run at a time; return a line for each that failed.

    Args:
        out: Folder of the runs.
        console: Where progress is shown.
        conditions: What to train with.
        seeds: All conditions with the first seed first.
        steps: Trainer steps; `REPLAY_STEPS` times as many with replay.
        pace: See `VerlRun`.
        more: Overrides of all of them.
        config: verl's primary config.
        recipe: Of the base model, and with it the problems.
        measured: Measure the checkpoints of a run when it is over; see `exact`.
    """
    from verl_m2po.one_process import train

    model, data = tiny_model.build(recipe), out / "data"
    arithmetic.write_parquet(data, train_rows=quickstart.TRAINING_ROWS, validation_rows=256, digits=recipe.digits)
    failed = []
    for seed in seeds:
        for condition in conditions:
            last = steps * REPLAY_STEPS if condition.replay else steps
            run = VerlRun.next_attempt(out, condition, seed, last, pace, more, config)
            if any(last_step(log) >= last for log in run.folder.glob("attempt-*.jsonl")):
                _measure(run, measured, model, recipe.digits)
                continue
            console.print(f"{run.name}, attempt {run.attempt}")
            command = run.command(model.absolute(), data.absolute())
            run.folder.mkdir(parents=True, exist_ok=True)
            record = {"command": command, "versions": train.versions(), "machine": processor()}
            (run.folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            if status := quickstart.train(run, command, console):
                failed.append(f"{run.name}: exit status {status}, see {run.folder / 'console.log'}")
            else:
                _measure(run, measured, model, recipe.digits)
    return failed


def _measure(run: VerlRun, measured: bool, base_model: Path, digits: int) -> None:
    if measured and not exact.read(run.folder):
        exact.measure(run.folder, base_model, digits)
