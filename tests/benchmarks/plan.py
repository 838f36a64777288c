"""`python -m benchmarks.plan`: what the planner says of the runs of `benchmarks.modes`, beside what they took.

The measured seconds are those of the marked table of docs/benchmarks.md; no run is made here. What the planner is given
comes from `sync`'s column, and its own cost of a step on separate devices from one cell of `stale_k_separate`. The
response lengths are the runs' own: the same prompts in the same order, with the lengths that `paced` draws for them.
"""

import random
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pages import replace_section
from rich.console import Console

from benchmarks.modes import LEAVING_STEPS, LONGEST, PHASES, PROMPTS, RESPONSES, SETTLING_STEPS, TOKEN_S
from benchmarks.paced.agent_loop import Lengths, lengths_at
from verl_m2po.cli.quickstart import TRAINING_ROWS
from verl_m2po.planner.account import Outcome
from verl_m2po.planner.setting import Setting
from verl_m2po.planner.simulate import simulate
from verl_m2po.planner.workload import EngineCurve, Generation, Training, Workload

SECTION = "plan"
MODES = {
    "sync": Setting("sync"),
    "stale_k": Setting("stale_k", 1),
    "stale_k_separate": Setting("stale_k_separate", 1),
    "bounded_async": Setting("bounded_async", 2),
}
FITTED = {("sync", phase) for phase in PHASES} | {("stale_k_separate", "0.5x")}


@dataclass(frozen=True)
class Measured:
    """The table of `benchmarks.modes`.

    Args:
        steps: that count in each phase.
        seconds: (column, phase) -> seconds; columns are Tg, Tt and the modes.
    """

    steps: int
    seconds: dict[tuple[str, str], float]


def read_table(page: Path) -> Measured:
    """The marked section of `page`."""
    text = page.read_text().split("<!-- modes: begin -->")[1].split("<!-- modes: end -->")[0]
    steps = re.search(r"--steps (\d+)", text)
    assert steps
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    columns = [cell.strip(" `") for cell in header.strip("|").split("|")]
    seconds = {}
    for row in rows:
        phase, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for column, cell in zip(columns[1:], cells, strict=True):
            seconds[column, phase] = float(cell.split()[0])
    return Measured(int(steps[1]), seconds)


class RunsOwnLengths:
    """Lengths by prompt and phase, as `paced.agent_loop` draws them; prompts in the order of verl's sampler, seed 1."""

    def __init__(self, length: int) -> None:
        order = torch.randperm(TRAINING_ROWS, generator=torch.Generator().manual_seed(1))
        self._order = iter(order.tolist())
        phases = enumerate(PHASES.values())
        self._lengths = [Lengths(1 + i * length, median, sigma, LONGEST) for i, (median, sigma) in phases]

    def draw(self, rng: np.random.Generator, groups: int, responses: int, version: int) -> list[list[int]]:
        lengths = lengths_at(self._lengths, version + 1)
        prompts = [next(self._order) for _ in range(groups)]
        return [[lengths.draw(random.Random(f"{index}/{i}")) for i in range(responses)] for index in prompts]


def generation_of(measured: Measured) -> tuple[float, float]:
    """Seconds of each token, and before the first one, in `sync`."""
    # Two points give a line: seconds of a batch of one length.
    (short, _), (long, _) = PHASES["0.5x"], PHASES["2x"]
    token_s = (measured.seconds["Tg", "2x"] - measured.seconds["Tg", "0.5x"]) / (long - short)
    assert token_s > TOKEN_S
    return token_s, measured.seconds["Tg", "0.5x"] - short * token_s


def workload(measured: Measured, phase: str, is_separate: bool) -> Workload:
    """What `sync` needs in `phase`, of each token and before the first one, and to train."""
    seconds = measured.seconds
    token_s, start_s = generation_of(measured)
    own_s = seconds["stale_k_separate", "0.5x"] - seconds["Tt", "0.5x"] if is_separate else 0.0
    requests = PROMPTS * RESPONSES
    curve = EngineCurve(((1, 1 / token_s), (requests, requests / token_s)), requests)
    length = SETTLING_STEPS + measured.steps + LEAVING_STEPS
    return Workload(
        PROMPTS,
        RESPONSES,
        RunsOwnLengths(length),
        Generation(1, curve, start_s, queue_delays_push=True),  # the runs are from before the patch
        Training(seconds["Tt", phase], push_s=own_s),
    )


def predict(measured: Measured, mode: str, phase: str) -> tuple[float, Outcome]:
    """Mean seconds of the steps of `phase` that count, of a whole run with all phases."""
    length = SETTLING_STEPS + measured.steps + LEAVING_STEPS
    setting = MODES[mode]
    run = workload(measured, phase, not setting.is_shared)
    outcome = simulate(setting, run, steps=length * len(PHASES), warm_up=0, run_steps=length * len(PHASES))
    place = list(PHASES).index(phase)
    counted = outcome.step_s[place * length + SETTLING_STEPS : (place + 1) * length - LEAVING_STEPS]
    return float(np.mean(counted)), outcome


def table(measured: Measured) -> str:
    """Predicted and measured, each setting a row."""
    lines = ["| mode | generation | measured s | predicted s | error | fitted |", "|---|---|---:|---:|---:|---|"]
    errors = []
    for mode in MODES:
        for phase in PHASES:
            predicted, _ = predict(measured, mode, phase)
            real = measured.seconds[mode, phase]
            is_fitted = (mode, phase) in FITTED
            if not is_fitted:
                errors.append(abs(predicted / real - 1))
            lines.append(
                f"| `{mode}` | {phase} | {real:.2f} | {predicted:.2f} | {predicted / real - 1:+.0%} | "
                f"{'yes' if is_fitted else ''} |"
            )
    within = sum(error <= 0.1 for error in errors)
    head = (
        f"`python -m benchmarks.plan`, {date.today()}: of {len(errors)} settings that were not fitted, {within} within "
        f"10%; the largest error is {max(errors):.0%}, the mean {np.mean(errors):.1%}."
    )
    return "\n".join([head, "", *lines])


def main(
    page: Annotated[Path, typer.Option(help="Where the measured table stands.")] = Path("docs/benchmarks.md"),
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
) -> None:
    """The planner's seconds per step beside those of real runs."""
    made = table(read_table(page))
    if out is None:
        Console().print(made, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, made)


if __name__ == "__main__":
    typer.run(main)
