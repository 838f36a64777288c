"""`python -m benchmarks.trainer_step`: a trainer step with the exact trust region against verl's own.

Runs of the quickstart's task on the CPU, one after the other: verl's default step, which pays a forward pass for
old_log_probs, and m2po with scope=mini_batch, which pays one for the trust region. Micro-batches are so small that each
mini-batch has several, or the forward pass would not be needed.
"""

import statistics
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from pages import processor, replace_section
from rich.console import Console

from verl_m2po.cli.quickstart import Run, prepare, read_log, train

SECTION = "trainer step"
# A mini-batch of 64 sequences of about 17 tokens, in four micro-batches.
SMALL = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=320"
CONTESTANTS = {
    "verl's default: `vanilla`, old_log_probs recomputed": (
        "vanilla",
        ("algorithm.rollout_correction.bypass_mode=false",),
    ),
    "`m2po`, scope=mini_batch": ("m2po", ()),
    "`m2po`, scope=micro_batch": ("m2po", ("actor_rollout_ref.actor.policy_loss.m2po.scope=micro_batch",)),
}
# Forward and backward passes of the trainer; generation is the same for all.
TIMINGS = ("timing_s/old_log_prob", "timing_s/update_actor")
WARM_UP = 2


def main(
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
    steps: Annotated[int, typer.Option(help="Trainer steps that count.", min=1)] = 12,
    folder: Annotated[Path, typer.Option(help="Where the runs write.")] = Path("outputs/bench"),
) -> None:
    """Seconds a trainer step spends in old_log_probs and in the update."""
    console = Console()
    lines = [
        f"`python -m benchmarks.trainer_step --steps {steps}`, {date.today()}, {processor()}: the "
        "quickstart's task, 256 responses and four updates a step, four micro-batches an update, seed 1. "
        f"Median of {steps} steps in seconds.",
        "",
        "| | old_log_probs | update | together |",
        "|---|---:|---:|---:|",
    ]
    for name, (loss, overrides) in CONTESTANTS.items():
        medians = _run(folder / str(len(lines)), loss, overrides, steps, console)
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in (*medians, sum(medians))) + " |")
    table = "\n".join(lines)
    if out is None:
        console.print(table, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, table)


def _run(folder: Path, loss: str, overrides: tuple[str, ...], steps: int, console: Console) -> list[float]:
    quiet = ("trainer.val_before_train=false", "trainer.test_freq=-1", SMALL)
    run = Run(folder.absolute(), steps + WARM_UP, loss, seed=1, overrides=(*quiet, *overrides))
    model, data = prepare(run, console)
    if train(run, run.command(model.absolute(), data.absolute()), console):
        raise typer.Exit(1)
    rows = [row["data"] for row in read_log(run.metrics)][WARM_UP:]
    return [statistics.median(row[timing] for row in rows) for timing in TIMINGS]


if __name__ == "__main__":
    typer.run(main)
