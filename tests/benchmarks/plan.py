"""`python -m benchmarks.plan`: what the planner says of the runs of `benchmarks.plan_runs`, beside what they did.

No run is made here. What the planner is given comes from the run of `sync`, and its own cost of a step on separate
devices from one cell of `stale_k_separate`. The response lengths are the runs' own: the same prompts in the same order,
with the lengths that `paced` draws for them.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from pages import replace_section
from rich.console import Console

from benchmarks.modes import LEAVING_STEPS, LONGEST, PHASES, PROMPTS, RESPONSES, SETTLING_STEPS
from benchmarks.paced.agent_loop import Lengths, lengths_at
from benchmarks.plan_runs import Cell, Measured
from verl_m2po.cli.quickstart import TRAINING_ROWS
from verl_m2po.planner.account import Outcome
from verl_m2po.planner.setting import Setting
from verl_m2po.planner.simulate import simulate
from verl_m2po.planner.workload import EngineCurve, Generation, Training, Workload

SECTION = "plan"
FITTED = {("sync", phase) for phase in PHASES} | {("stale_k_separate", "0.5x")}
MOST_SECONDS_ERROR, MOST_AGE_ERROR = 0.1, 1.0


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


@dataclass(frozen=True)
class Fit:
    """What the planner is told.

    Args:
        token_s: of every request, whatever the number in flight.
        start_s: from a request to its first token.
        training_s: of a step, by phase.
        separate_s: what a step on separate devices takes besides.
    """

    token_s: float
    start_s: float
    training_s: dict[str, float]
    separate_s: float

    @classmethod
    def of(cls, measured: Measured) -> "Fit":
        """From the fitted cells."""
        sync = {phase: measured.cell("sync", 0, phase) for phase in PHASES}
        generation = {phase: fmean(cell.generation_s) for phase, cell in sync.items()}
        training = {phase: fmean(cell.step_s) - generation[phase] for phase, cell in sync.items()}
        # Two points give a line: seconds of a batch of one length.
        (short, _), (long, _) = PHASES["0.5x"], PHASES["2x"]
        token_s = (generation["2x"] - generation["0.5x"]) / (long - short)
        separate = fmean(measured.cell("stale_k_separate", 1, "0.5x").step_s) - training["0.5x"]
        return cls(token_s, generation["0.5x"] - short * token_s, training, separate)

    def workload(self, phase: str, is_separate: bool, length: int) -> Workload:
        """Of a run in which training takes as long as in `phase`."""
        requests = PROMPTS * RESPONSES
        curve = EngineCurve(((1, 1 / self.token_s), (requests, requests / self.token_s)), requests)
        return Workload(
            PROMPTS,
            RESPONSES,
            RunsOwnLengths(length),
            Generation(1, curve, self.start_s),
            Training(self.training_s[phase], push_s=self.separate_s if is_separate else 0.0),
        )


def predict(measured: Measured, fit: Fit, mode: str, staleness_steps: int, phase: str) -> Outcome:
    """The steps of `phase` that count, of a whole run with all phases."""
    length, setting = measured.length, Setting(mode, staleness_steps)
    begins = list(PHASES).index(phase) * length + SETTLING_STEPS
    run = fit.workload(phase, not setting.is_shared, length)
    return simulate(
        setting,
        run,
        steps=length - SETTLING_STEPS - LEAVING_STEPS,
        warm_up=begins,
        run_steps=length * len(PHASES),
    )


@dataclass(frozen=True)
class Comparison:
    """A cell, and what was predicted of it."""

    cell: Cell
    outcome: Outcome

    @property
    def is_fitted(self) -> bool:
        """Whether the planner was given it."""
        return (self.cell.mode, self.cell.phase) in FITTED

    @property
    def seconds_error(self) -> float:
        """As a share of what was measured."""
        return self.outcome.mean_step_s / fmean(self.cell.step_s) - 1

    @property
    def age_error(self) -> float:
        """In trainer steps."""
        return self.outcome.mean_age - self.cell.mean_age_steps


def comparisons(measured: Measured) -> Iterator[Comparison]:
    """All cells."""
    fit = Fit.of(measured)
    for cell in measured.cells:
        yield Comparison(cell, predict(measured, fit, cell.mode, cell.staleness_steps, cell.phase))


def table(measured: Measured) -> str:
    """Predicted and measured, each cell a row."""
    lines = [
        "| mode | staleness (steps) | generation | measured s | predicted s | error | measured age | predicted age "
        "| fitted |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    compared = sorted(comparisons(measured), key=lambda each: (each.cell.mode, each.cell.staleness_steps))
    for each in compared:
        cell, outcome = each.cell, each.outcome
        lines.append(
            f"| `{cell.mode}` | {cell.staleness_steps} | {cell.phase} | {fmean(cell.step_s):.2f} "
            f"| {outcome.mean_step_s:.2f} | {each.seconds_error:+.0%} | {cell.mean_age_steps:.2f} "
            f"| {outcome.mean_age:.2f} | {'yes' if each.is_fitted else ''} |"
        )
    return "\n".join([_head(measured, [each for each in compared if not each.is_fitted]), "", *lines])


def _head(measured: Measured, free: list[Comparison]) -> str:
    seconds, ages = [abs(each.seconds_error) for each in free], [abs(each.age_error) for each in free]
    near = sum(error <= MOST_SECONDS_ERROR for error in seconds), sum(error <= MOST_AGE_ERROR for error in ages)
    return (
        f"`python -m benchmarks.plan_runs`, then `plan`; {measured.day}, {measured.machine}, shared with other work, "
        f"seed 1: {measured.pace.token_s * 1e3:.0f} ms a token, {measured.pace.update_s:g} s and a little an update, "
        f"{measured.steps} steps of each. Of {len(free)} settings that were not fitted, {near[0]} are within "
        f"{MOST_SECONDS_ERROR:.0%} in seconds (largest error {max(seconds):.0%}, mean {fmean(seconds):.1%}) and "
        f"{near[1]} within one trainer step in mean age (largest error {max(ages):.2f}, mean {fmean(ages):.2f})."
    )


def main(
    runs: Annotated[Path, typer.Option(help="What `benchmarks.plan_runs` has written.")] = Path(
        "docs/results/plan_runs.json"
    ),
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
) -> None:
    """The planner's seconds per step and ages beside those of real runs."""
    made = table(Measured.read(runs))
    if out is None:
        Console().print(made, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, made)


if __name__ == "__main__":
    typer.run(main)
