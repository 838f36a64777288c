"""`python -m benchmarks.plan_runs`: the real runs that the planner is compared with, into docs/results/plan_runs.json.

They are runs of `benchmarks.modes` with the ages of what they trained, which their ledgers tell, and at half its pace:
the slower the tokens and updates, the less do they depend on what else the machine does.
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
STALENESS_STEPS = {"sync": (0,), "bounded_async": (2, 4, 1), "stale_k_separate": (1,), "stale_k": (1,)}


@dataclass(frozen=True)
class Cell:
    """The steps of one phase that count.

    Args:
        mode: trainer mode.
        staleness_steps: exact, or the bound.
        phase: of `benchmarks.modes`.
        step_s: of each step, seconds.
        generation_s: the part of each step of `sync` in which it generates; empty in the others.
        mean_age_steps: of the tokens that were trained in these steps and not masked.
    """

    mode: str
    staleness_steps: int
    phase: str
    step_s: list[float]
    generation_s: list[float]
    mean_age_steps: float


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

    def cell(self, mode: str, staleness_steps: int, phase: str) -> Cell:
        """The one of these runs."""
        wanted = (mode, staleness_steps, phase)
        return next(each for each in self.cells if (each.mode, each.staleness_steps, each.phase) == wanted)

    @property
    def settings(self) -> list[tuple[str, int]]:
        """(mode, staleness in trainer steps) of each run."""
        return list(dict.fromkeys((each.mode, each.staleness_steps) for each in self.cells))


def contestant(mode: str, staleness_steps: int) -> Contestant:
    """Its settings; one update a step, so a trainer step of staleness is an update."""
    if mode == "sync":
        return Contestant(mode, is_separate=False, has_ledger=False)
    overrides = (f"trainer.v1.{mode}.staleness_updates={staleness_steps}",)
    return Contestant(mode, overrides, mode != "stale_k", name=f"{mode}_{staleness_steps}")


def _age(batches: list[dict]) -> float:
    """Mean age of the tokens that were trained and not masked, in trainer steps."""
    aged = tokens = 0
    for batch in batches:
        oldest = batch["version"] if batch["oldest_version"] is None else batch["oldest_version"]
        spans = [span for group in batch["groups"] for _, row in group[3] for span in row]
        kept = [(v, n) for v, n in spans if batch["oldest_version"] is None or v >= oldest]
        aged += sum((batch["version"] - v) * n for v, n in kept)
        tokens += sum(n for _, n in kept)
    return aged / tokens


def _cells(mode: str, staleness_steps: int, rows: list[dict], folder: Path, length: int) -> list[Cell]:
    batches = [] if mode == "sync" else list(ledger.surviving(ledger.read(folder / "ledger.jsonl").whole))
    cells = []
    for i, phase in enumerate(PHASES):
        counted = slice(i * length + SETTLING_STEPS, (i + 1) * length - LEAVING_STEPS)
        seconds = [row["timing_s/step"] for row in rows[counted]]
        generation = [row["timing_s/gen"] for row in rows[counted]] if mode == "sync" else []
        age = _age(batches[counted]) if batches else 0.0
        cells.append(Cell(mode, staleness_steps, phase, seconds, generation, age))
    return cells


def main(
    out: Annotated[Path, typer.Option(help="Runs that it already holds are not made again.")] = Path(
        "docs/results/plan_runs.json"
    ),
    steps: Annotated[int, typer.Option(help="Trainer steps of each phase that count.", min=1)] = 4,
    folder: Annotated[Path, typer.Option(help="Where the runs write.")] = Path("outputs/plan-runs"),
    only: Annotated[str | None, typer.Option(help="One mode.")] = None,
    staleness_steps: Annotated[int | None, typer.Option(help="One staleness of it, in trainer steps.")] = None,
) -> None:
    """Make the runs, each with four speeds of generation."""
    console = Console()
    for mode, stalenesses in STALENESS_STEPS.items():
        for staleness in stalenesses:
            done = Measured.read(out) if out.exists() else Measured(processor(), "", PACE, steps, [])
            is_asked = (only is None or mode == only) and (staleness_steps is None or staleness == staleness_steps)
            if not is_asked or (mode, staleness) in done.settings:
                continue
            each = contestant(mode, staleness)
            rows = run_contestant(each, folder.absolute(), done.length, PACE, console)
            cells = _cells(mode, staleness, rows, folder / each.label, done.length)
            assert (done.pace, done.steps, done.machine) == (PACE, steps, processor()), "other runs than those in --out"
            Measured(done.machine, str(date.today()), PACE, steps, [*done.cells, *cells]).write(out)
            told = {cell.phase: (round(fmean(cell.step_s), 2), round(cell.mean_age_steps, 2)) for cell in cells}
            console.print(f"{each.label}: {told}", markup=False)


if __name__ == "__main__":
    typer.run(main)
