"""`python -m benchmarks.plan_study`: how far `bounded_async` scales, from 8 to 10,000 devices, into docs/planner.md.

The work grows with the devices, a tenth of which train. The share of the time in which the trainer trains is simulated;
what failures of devices take from it follows from their rate, since a simulation of minutes sees few of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import Annotated

import typer
from pages import processor, replace_section
from rich.console import Console

from verl_m2po.planner.account import Outcome
from verl_m2po.planner.simulate import Setting, simulate
from verl_m2po.planner.workload import (
    SECONDS_PER_YEAR,
    EngineCurve,
    Generation,
    QuantileLengths,
    Training,
    Workload,
)

SECTION = "plan-scale"
DEVICES = (8, 64, 512, 4096, 10_000)
BOUNDS = (2, 4, 6, 8)
GOAL = 0.9
RESPONSES, RESPONSES_PER_DEVICE = 8, 11
TRAINING_S, PUSH_S, PUSH_S_PER_DOUBLING = 15.0, 1.0, 0.1
RESTART_S, CHECKPOINT_STEPS, FAILURES_PER_DEVICE_YEAR = 600.0, 20, 1.0
CURVE = EngineCurve(((1, 60.0), (32, 1500.0), (128, 3500.0), (256, 4500.0)), 256)
LENGTHS = QuantileLengths({0.5: 900, 0.9: 3000}, 8192)


def workload(devices: int, has_stragglers: bool) -> Workload:
    """A tenth of the devices, one at least, trains; a push takes longer with each doubling of the devices."""
    trainers = max(1, devices // 10)
    push_s = PUSH_S + PUSH_S_PER_DOUBLING * log2(devices)
    return Workload(
        devices * RESPONSES_PER_DEVICE // RESPONSES,
        RESPONSES,
        LENGTHS,
        Generation(devices - trainers, CURVE, prefill_tokens_per_s=30_000, speed_spread=0.1 if has_stragglers else 0),
        Training(TRAINING_S, push_s=push_s, devices=trainers, spread=0.05 if has_stragglers else 0),
        prompt_tokens=200,
    )


@dataclass(frozen=True)
class Row:
    """A size under a bound of so many trainer steps; `outcome` without failures."""

    devices: int
    bound_steps: int
    outcome: Outcome

    @property
    def training(self) -> float:
        """Share of the time in which the trainer does not wait for rollouts."""
        return 1 - self.outcome.trainer_idle

    def with_failures(self, heals: bool) -> float:
        """The same, where a device fails once a year: what a restart takes, and half of the steps since a checkpoint.

        Args:
            heals: only a device that trains ends the run; the others start their requests again elsewhere.
        """
        devices = max(1, self.devices // 10) if heals else self.devices
        rate = FAILURES_PER_DEVICE_YEAR * devices / SECONDS_PER_YEAR
        lost_s = RESTART_S + CHECKPOINT_STEPS / 2 * self.outcome.mean_step_s
        return self.training / (1 + rate * lost_s)


def rows(has_stragglers: bool, steps: int, most_devices: int) -> Iterator[Row]:
    """All sizes under all bounds."""
    for devices in DEVICES:
        if devices <= most_devices:
            for bound in BOUNDS:
                outcome = simulate(Setting("bounded_async", bound), workload(devices, has_stragglers), steps)
                yield Row(devices, bound, outcome)


def table(calm: list[Row], uneven: list[Row]) -> Iterator[str]:
    """Markdown: a row for each size and bound."""
    yield (
        "| devices | bound (steps) | s a step | mean age (steps) | wasted tokens | trains | with stragglers "
        "| and failures, restarts | and failures, healing |"
    )
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for even, row in zip(calm, uneven, strict=True):
        shares = (even.training, row.training, row.with_failures(heals=False), row.with_failures(heals=True))
        cells = " | ".join(f"**{share:.0%}**" if share >= GOAL else f"{share:.0%}" for share in shares)
        known = row.outcome
        yield (
            f"| {row.devices:,} | {row.bound_steps} | {known.mean_step_s:.1f} | {known.mean_age:.1f} "
            f"| {known.wasted_share:.0%} | {cells} |"
        )


def main(
    steps: Annotated[int, typer.Option(help="Trainer steps that count.", min=1)] = 12,
    most_devices: Annotated[int, typer.Option(help="Larger sizes are left out.")] = max(DEVICES),
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = Path("docs/planner.md"),
) -> None:
    """Simulate every size under every bound (about ten minutes)."""
    calm, uneven = (list(rows(has_stragglers, steps, most_devices)) for has_stragglers in (False, True))
    said = f"`python -m benchmarks.plan_study`, {steps} steps of each, seed 0 ({processor()}); {GOAL:.0%} or more bold:"
    replace_section(page, SECTION, "\n".join((said, "", *table(calm, uneven))))
    Console().print(f"written: {page}")


if __name__ == "__main__":
    typer.run(main)
