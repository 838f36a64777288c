"""`python -m benchmarks.modes`: seconds per trained batch of the trainer modes, side by side.

One real run a mode on the CPU, with verl's own `sync` and `separate_async` beside ours. How long a token and an update
take is given (`benchmarks.paced`), most of it slept, so that generation and training overlap as they do on
devices of their own. In one run the responses grow from phase to phase, which slows generation down against training.
"""

import os
import statistics
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from pages import processor, replace_section
from rich.console import Console

from benchmarks.paced import SECONDS_PER_TOKEN, SECONDS_PER_UPDATE
from benchmarks.paced.agent_loop import NAME, Lengths, write_config
from verl_m2po.cli.quickstart import Run, prepare, read_log, train

SECTION = "modes"
PROMPTS, RESPONSES, LONGEST = 8, 4, 256
TOKEN_S, UPDATE_S = 0.05, 1.5
# A batch of one length needs about that many times TOKEN_S; an update needs UPDATE_S and a little.
PHASES = {
    "0.5x": (16, 0.0),
    "1x": (36, 0.0),
    "2x": (76, 0.0),
    "long tail": (30, 0.8),
}
# The first batches of a phase were dispatched in the phase before, or wait behind such.
SETTLING_STEPS = 2
# In the last step of a phase the next phase's batches are generated, in the last of the run nothing is.
LEAVING_STEPS = 1


@dataclass(frozen=True)
class Pace:
    """Least seconds of an engine step, and seconds slept in an update."""

    token_s: float = TOKEN_S
    update_s: float = UPDATE_S


@dataclass(frozen=True)
class Contestant:
    """A trainer mode and what it is set to; `name` is that of its folder, by default the mode's."""

    mode: str
    overrides: tuple[str, ...] = ()
    is_separate: bool = True
    has_ledger: bool = True
    name: str | None = None

    @property
    def label(self) -> str:
        """Name of its folder."""
        return self.mode if self.name is None else self.name


CONTESTANTS = (
    Contestant("sync", is_separate=False, has_ledger=False),
    Contestant("stale_k", ("trainer.v1.stale_k.staleness_updates=1",), is_separate=False),
    Contestant("stale_k_separate", ("trainer.v1.stale_k_separate.staleness_updates=1",)),
    Contestant("bounded_async", ("trainer.v1.bounded_async.staleness_updates=2",)),
    Contestant("separate_async", ("trainer.v1.separate_async.parameter_sync_step=1",), has_ledger=False),
)
SEPARATE = ("actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.nnodes=1")


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    steps: Annotated[int, typer.Option(help="Trainer steps of each phase that count.", min=1)] = 6,
    folder: Annotated[Path, typer.Option(help="Where the runs write.")] = Path("outputs/bench-modes"),
    only: Annotated[list[str] | None, typer.Option(help="Run these modes, and read the others' logs.")] = None,
) -> None:
    """Seconds per trained batch: sync, our modes, and verl's separate_async, by the speed of generation."""
    console = Console()
    length = SETTLING_STEPS + steps + LEAVING_STEPS
    logs = {
        each.mode: run_contestant(each, folder.absolute(), length, Pace(), console, only is None or each.mode in only)
        for each in CONTESTANTS
    }
    table = "\n".join(_table({mode: rows for mode, rows in logs.items() if rows}, length))
    if out is None:
        console.print(table, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, table)


def run_contestant(
    contestant: Contestant, folder: Path, length: int, pace: Pace, console: Console, is_run: bool = True
) -> list[dict]:
    """The logged rows of its run, all phases of `length` trainer steps one after the other.

    Args:
        contestant: mode and settings.
        folder: of all runs.
        length: trainer steps of a phase.
        pace: of tokens and updates.
        console: where the progress is shown.
        is_run: False reads the log of an earlier run.
    """
    run_folder = folder / contestant.label
    run_folder.mkdir(parents=True, exist_ok=True)
    lengths = [Lengths(1 + i * length, median, sigma, LONGEST) for i, (median, sigma) in enumerate(PHASES.values())]
    write_config(str(run_folder / "agent_loop.yaml"), lengths)
    ledger = f"trainer.v1.{contestant.mode}.ledger_path={run_folder / 'ledger.jsonl'}"
    overrides = (
        f"trainer.v1.trainer_mode={contestant.mode}",
        *contestant.overrides,
        *(SEPARATE if contestant.is_separate else ()),
        *([ledger] if contestant.has_ledger else ()),
        f"data.train_batch_size={PROMPTS}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        f"data.max_response_length={LONGEST}",
        # The engine is full with one batch: more in flight do not come for nothing.
        f"actor_rollout_ref.rollout.max_num_seqs={PROMPTS * RESPONSES}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
        "actor_rollout_ref.actor.optim.optimizer_impl=benchmarks.paced.optimizer",
        "actor_rollout_ref.actor.optim.optimizer=PacedAdamW",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=benchmarks.paced.token_time:TokenTime",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={run_folder / 'agent_loop.yaml'}",
        f"actor_rollout_ref.rollout.agent.default_agent_loop={NAME}",
        "ray_kwargs.ray_init.address=local",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
    )
    run = Run(run_folder, length * len(PHASES), "m2po", seed=1, overrides=overrides)
    if is_run:
        os.environ |= {SECONDS_PER_TOKEN: str(pace.token_s), SECONDS_PER_UPDATE: str(pace.update_s)}
        model, data = prepare(run, console)
        if train(run, run.command(model.absolute(), data.absolute()), console):
            raise typer.Exit(1)
    return [row["data"] for row in read_log(run.metrics)]


def _table(logs: dict[str, list[dict]], length: int) -> list[str]:
    steps = length - SETTLING_STEPS - LEAVING_STEPS
    lines = [
        f"`python -m benchmarks.modes --steps {steps}`, {date.today()}, {processor()}, seed 1: {PROMPTS} prompts "
        f"x {RESPONSES} responses, one update a step, {TOKEN_S * 1e3:.0f} ms a token, {UPDATE_S:g} s and a little an "
        f"update. Seconds of a trainer step, mean of {steps} steps; in brackets the share of max(Tg, Tt) in it. Tg "
        "and Tt are the two parts of `sync`'s step, generation and all the rest.",
        "",
        "| generation | Tg | Tt | max(Tg, Tt) | " + " | ".join(f"`{mode}`" for mode in logs) + " |",
        "|---|" + "---:|" * (3 + len(logs)),
    ]
    for i, phase in enumerate(PHASES):
        counted = slice(i * length + SETTLING_STEPS, (i + 1) * length - LEAVING_STEPS)
        generation = _mean(logs["sync"][counted], lambda row: row["timing_s/gen"])
        training = _mean(logs["sync"][counted], lambda row: row["timing_s/step"] - row["timing_s/gen"])
        limit = max(generation, training)
        cells = []
        for rows in logs.values():
            taken = _mean(rows[counted], lambda row: row["timing_s/step"])
            cells.append(f"{taken:.2f} ({limit / taken:.0%})")
        lines.append(f"| {phase} | {generation:.2f} | {training:.2f} | {limit:.2f} | " + " | ".join(cells) + " |")
    return lines


def _mean(rows: list[dict], value) -> float:
    return statistics.fmean(map(value, rows))


if __name__ == "__main__":
    typer.run(main)
