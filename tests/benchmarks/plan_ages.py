"""`python -m benchmarks.plan_ages`: the ages that the planner predicts, beside those of the runs of `plan_runs`.

The planner is told how long training takes in each phase of the run under the first bound, and in its first phase what
a trainer step takes besides; from `sync`'s column of the table of `benchmarks.modes` what a token takes beyond its
pace, and the seconds before the first one. Seconds of that first cell are therefore given, all the rest is predicted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from pages import replace_section
from rich.console import Console

from benchmarks.modes import LEAVING_STEPS, PHASES, PROMPTS, RESPONSES, SETTLING_STEPS, TOKEN_S
from benchmarks.plan import RunsOwnLengths, generation_of, read_table
from benchmarks.plan_runs import BOUND_STEPS, Cell, Measured
from verl_m2po.planner.account import Outcome
from verl_m2po.planner.setting import Setting
from verl_m2po.planner.simulate import simulate
from verl_m2po.planner.workload import EngineCurve, Generation, Training, Workload

SECTION = "plan-ages"
FITTED = (BOUND_STEPS[0], next(iter(PHASES)))
MOST_SECONDS_ERROR, MOST_AGE_ERROR = 0.1, 1.0


@dataclass(frozen=True)
class Fit:
    """What the planner is told.

    Args:
        token_s: of every request, whatever the number in flight.
        start_s: from a request to its first token.
        training_s: of a step, by phase.
        besides_s: of a step, beside training and waiting.
    """

    token_s: float
    start_s: float
    training_s: dict[str, float]
    besides_s: float

    @classmethod
    def of(cls, measured: Measured, page: Path) -> "Fit":
        """From the run under the first bound, and the table on `page`."""
        own = {cell.phase: cell for cell in measured.cells if cell.bound_steps == FITTED[0]}
        first = own[FITTED[1]]
        token_s, start_s = generation_of(read_table(page))
        training = {phase: cell.training_s for phase, cell in own.items()}
        return cls(measured.pace.token_s + token_s - TOKEN_S, start_s, training, first.step_s - first.training_s)

    def workload(self, phase: str, length: int) -> Workload:
        """Of a run in which training takes as long as in `phase`."""
        requests = PROMPTS * RESPONSES
        curve = EngineCurve(((1, 1 / self.token_s), (requests, requests / self.token_s)), requests)
        training = Training(self.training_s[phase], push_s=self.besides_s)
        servers = Generation(1, curve, self.start_s, queue_delays_push=True)  # the runs are from before the patch
        return Workload(PROMPTS, RESPONSES, RunsOwnLengths(length), servers, training)


@dataclass(frozen=True)
class Comparison:
    """A cell, and what was predicted of it."""

    cell: Cell
    outcome: Outcome

    @property
    def seconds_error(self) -> float:
        """As a share of what was measured."""
        return self.outcome.mean_step_s / self.cell.step_s - 1

    @property
    def age_error(self) -> float:
        """In trainer steps."""
        return self.outcome.mean_age - self.cell.age_steps


def comparisons(measured: Measured, page: Path) -> Iterator[Comparison]:
    """All cells."""
    fit, length = Fit.of(measured, page), measured.length
    for cell in sorted(measured.cells, key=lambda each: each.bound_steps):
        begins = list(PHASES).index(cell.phase) * length + SETTLING_STEPS
        outcome = simulate(
            Setting("bounded_async", cell.bound_steps),
            fit.workload(cell.phase, length),
            steps=length - SETTLING_STEPS - LEAVING_STEPS,
            warm_up=begins,
            run_steps=length * len(PHASES),
        )
        yield Comparison(cell, outcome)


def table(measured: Measured, page: Path) -> str:
    """Predicted and measured, each cell a row."""
    lines = [
        "| bound (steps) | generation | measured age (steps) | predicted age | error | measured s | predicted s "
        "| error |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    compared = list(comparisons(measured, page))
    for each in compared:
        cell, outcome = each.cell, each.outcome
        lines.append(
            f"| {cell.bound_steps} | {cell.phase} | {cell.age_steps:.2f} | {outcome.mean_age:.2f} "
            f"| {each.age_error:+.2f} | {cell.step_s:.2f} | {outcome.mean_step_s:.2f} | {each.seconds_error:+.0%} |"
        )
    return "\n".join([_head(measured, compared), "", *lines])


def _head(measured: Measured, compared: list[Comparison]) -> str:
    ages = [abs(each.age_error) for each in compared]
    seconds = [abs(each.seconds_error) for each in compared if (each.cell.bound_steps, each.cell.phase) != FITTED]
    near = sum(error <= MOST_AGE_ERROR for error in ages), sum(error <= MOST_SECONDS_ERROR for error in seconds)
    return (
        f"`python -m benchmarks.plan_runs`, then `plan_ages`; {measured.day}, {measured.machine}, shared with other "
        f"work, seed 1: {PROMPTS} prompts x {RESPONSES} responses, one update a step, {measured.pace.token_s * 1e3:.0f}"
        f" ms a token, {measured.pace.update_s:g} s and a little an update, {measured.steps} steps of each. Of "
        f"{len(ages)} settings {near[0]} are within one trainer step in mean age (largest error {max(ages):.2f}, mean "
        f"{fmean(ages):.2f}); in seconds {near[1]} of {len(seconds)} are within {MOST_SECONDS_ERROR:.0%}."
    )


def main(
    runs: Annotated[Path, typer.Option(help="What `benchmarks.plan_runs` has written.")] = Path(
        "docs/results/plan_runs.json"
    ),
    page: Annotated[Path, typer.Option(help="Where the table of `benchmarks.modes` stands.")] = Path(
        "docs/benchmarks.md"
    ),
    out: Annotated[Path | None, typer.Option(help="Markdown file whose marked section is replaced.")] = None,
) -> None:
    """The planner's ages beside those of real runs."""
    made = table(Measured.read(runs), page)
    if out is None:
        Console().print(made, markup=False, soft_wrap=True)
    else:
        replace_section(out, SECTION, made)


if __name__ == "__main__":
    typer.run(main)
