"""`python -m benchmarks.plan_runs`: real runs whose ages the planner is compared with, in docs/results/plan_runs.json.

They are runs of `benchmarks.modes` in `bounded_async` under several bounds, the only mode whose ages are not given by
its setting, and at half its pace: the slower the tokens and updates, the less do they depend on what else the machine
does. The ages are those that the ledgers tell.
"""

import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from pages import processor
from rich.console import Console

from benchmarks.modes import LEAVING_STEPS, PHASES, SETTLING_STEPS, Contestant, Pace, run_contestant
from verl_m2po.ground import ledger

PACE = Pace(token_s=0.1, update_s=3.0)
BOUND_STEPS = (2, 4, 1)
TRAINING_PHASES = ("timing_s/update_actor", "timing_s/adv")


@dataclass(frozen=True)
class Cell:
    """The steps of one phase that count, means.

    Args:
        bound_steps: trainer steps.
        phase: of `benchmarks.modes`.
        step_s: seconds of a trainer step.
        training_s: those of them in which it trains.
        age_steps: of the tokens that were trained and not masked.
    """

    bound_steps: int
    phase: str
    step_s: float
    training_s: float
    age_steps: float


@dataclass(frozen=True)
class Measured:
    """All runs, as the JSON file holds them.

    Args:
        machine: its processor.
        day: of the last run.
        pace: of all runs.
        steps: that count in each phase.
        cells: measured.
    """

    machine: str
    day: str
    pace: Pace
    steps: int
    cells: list[Cell]

    @classmethod
    def read(cls, path: Path) -> "Measured":
        """From what `write` has written."""
        told = json.loads(path.read_text())
        return cls(**told | {"pace": Pace(**told["pace"]), "cells": [Cell(**each) for each in told["cells"]]})

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @property
    def length(self) -> int:
        """Trainer steps of a phase, with those that do not count."""
        return SETTLING_STEPS + self.steps + LEAVING_STEPS


def _age(batches: list[dict]) -> float:
    aged = tokens = 0
    for batch in batches:
        spans = [span for group in batch["groups"] for _, row in group[3] for span in row]
        kept = [(v, n) for v, n in spans if batch["oldest_version"] is None or v >= batch["oldest_version"]]
        aged += sum((batch["version"] - v) * n for v, n in kept)
        tokens += sum(n for _, n in kept)
    return aged / tokens


def cells(bound_steps: int, rows: list[dict], batches: list[dict], length: int) -> list[Cell]:
    """From a run's log and its ledger.

    Args:
        bound_steps: of the run.
        rows: logged, one a trainer step.
        batches: of the ledger.
        length: trainer steps of a phase.
    """
    found = []
    for i, phase in enumerate(PHASES):
        counted = slice(i * length + SETTLING_STEPS, (i + 1) * length - LEAVING_STEPS)
        seconds = fmean(row["timing_s/step"] for row in rows[counted])
        training = fmean(sum(row[name] for name in TRAINING_PHASES) for row in rows[counted])
        numbers = (seconds, training, _age(batches[counted]))
        found.append(Cell(bound_steps, phase, *(round(number, 3) for number in numbers)))
    return found


def main(
    out: Annotated[Path, typer.Option(help="Runs that it already holds are not made again.")] = Path(
        "docs/results/plan_runs.json"
    ),
    steps: Annotated[int, typer.Option(help="Trainer steps of each phase that count.", min=1)] = 4,
    folder: Annotated[Path, typer.Option(help="Where the runs write.")] = Path("outputs/plan-runs"),
    bounds: Annotated[list[int] | None, typer.Option(help="Trainer steps; all by default.")] = None,
) -> None:
    """Make the runs, each with four speeds of generation."""
    console = Console()
    for bound in bounds or BOUND_STEPS:
        done = Measured.read(out) if out.exists() else Measured(processor(), "", PACE, steps, [])
        assert (done.pace, done.steps) == (PACE, steps), "other runs than those in --out"
        if any(cell.bound_steps == bound for cell in done.cells):
            continue
        setting = f"trainer.v1.bounded_async.staleness_updates={bound}"  # one update a trainer step
        contestant = Contestant("bounded_async", (setting,), name=f"bounded_async_{bound}")
        rows = run_contestant(contestant, folder.absolute(), done.length, PACE, console)
        batches = ledger.surviving(ledger.read(folder / contestant.label / "ledger.jsonl").whole)
        made = cells(bound, rows, batches, done.length)
        Measured(processor(), str(date.today()), PACE, steps, [*done.cells, *made]).write(out)
        console.print(*made, sep="\n", markup=False)


if __name__ == "__main__":
    typer.run(main)
