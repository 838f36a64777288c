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
from pages import processor, replace_section, with_section
from rich.console import Console

from verl_m2po.planner.account import Outcome
from verl_m2po.planner.setting import OFF, Setting
from verl_m2po.planner.simulate import simulate
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
REPLAY = "x4"
RESPONSES, RESPONSES_PER_DEVICE = 8, 11
TRAINING_S, PUSH_S, PUSH_S_PER_DOUBLING = 15.0, 1.0, 0.1
RESTART_S, CHECKPOINT_STEPS, FAILURES_PER_DEVICE_YEAR = 600.0, 20, 1.0
CURVE = EngineCurve(((1, 60.0), (32, 1500.0), (128, 3500.0), (256, 4500.0)), 256)
LENGTHS = QuantileLengths({0.5: 900, 0.9: 3000}, 8192)


def trainers(devices: int) -> int:
    """Those that train."""
    return max(1, devices // 10)


def workload(devices: int, has_stragglers: bool) -> Workload:
    """A tenth of the devices, one at least, trains; a push takes longer with each doubling of the devices."""
    push_s = PUSH_S + PUSH_S_PER_DOUBLING * log2(devices)
    return Workload(
        4 * round(devices * RESPONSES_PER_DEVICE / RESPONSES / 4),  # a quarter of it is a whole number of prompts
        RESPONSES,
        LENGTHS,
        Generation(
            devices - trainers(devices), CURVE, prefill_tokens_per_s=30_000, speed_spread=0.1 if has_stragglers else 0
        ),
        Training(TRAINING_S, push_s=push_s, devices=trainers(devices), spread=0.05 if has_stragglers else 0),
        prompt_tokens=200,
    )


@dataclass(frozen=True)
class Row:
    """A size under a bound of so many trainer steps; the outcomes are without failures.

    Args:
        devices: of the whole run.
        bound_steps: trainer steps.
        calm: all servers and trainers alike.
        uneven: with stragglers.
        replayed: with stragglers, and `REPLAY`.
    """

    devices: int
    bound_steps: int
    calm: Outcome
    uneven: Outcome
    replayed: Outcome

    @classmethod
    def of(cls, devices: int, bound_steps: int, steps: int) -> "Row":
        """Simulate it."""
        once, again = (Setting("bounded_async", bound_steps, replay=replay) for replay in (OFF, REPLAY))
        calm, uneven = (workload(devices, has_stragglers) for has_stragglers in (False, True))
        return cls(
            devices,
            bound_steps,
            simulate(once, calm, steps),
            simulate(once, uneven, steps),
            simulate(again, uneven, steps),
        )

    def trains(self, is_replayed: bool) -> tuple[float, float, float]:
        """Share of the time in which the trainer trains: without failures, with restarts, and with healing."""
        outcome = self.replayed if is_replayed else self.uneven
        share = trained(outcome)
        return share, share * self._left(outcome, heals=False), share * self._left(outcome, heals=True)

    def _left(self, outcome: Outcome, heals: bool) -> float:
        """What failures leave of the time, where a device fails once a year.

        A restart takes its time, and the steps since the last checkpoint: half of what is between two. With healing
        only a device that trains ends the run; a server's requests start again elsewhere, and the servers that are
        being replaced at a time are a share of 2e-5 of all, which is left out.
        """
        devices = trainers(self.devices) if heals else self.devices
        rate = FAILURES_PER_DEVICE_YEAR * devices / SECONDS_PER_YEAR
        return 1 / (1 + rate * (RESTART_S + CHECKPOINT_STEPS / 2 * outcome.mean_step_s))


def trained(outcome: Outcome) -> float:
    """Share of the time in which the trainer does not wait for rollouts."""
    return 1 - outcome.trainer_idle


def details(rows: list[Row]) -> Iterator[str]:
    """Markdown: a row for each size and bound."""
    yield (
        "| devices | bound (steps) | s a step | mean age (steps) | wasted tokens | trains | with stragglers "
        f"| and failures, restarts | and failures, healing | `replay={REPLAY}`: trained again | with stragglers "
        "| and failures, restarts | and failures, healing |"
    )
    yield "|---:" * 13 + "|"
    for row in rows:
        known, shares = row.uneven, (trained(row.calm), *row.trains(is_replayed=False))
        yield (
            f"| {row.devices:,} | {row.bound_steps} | {known.mean_step_s:.1f} | {known.mean_age:.1f} "
            f"| {known.wasted_share:.0%} | {_cells(shares)} | {row.replayed.replayed_share:.0%} "
            f"| {_cells(row.trains(is_replayed=True))} |"
        )


def _cells(shares: tuple[float, ...]) -> str:
    return " | ".join(f"**{share:.0%}**" if share >= GOAL else f"{share:.0%}" for share in shares)


def answers(rows: list[Row]) -> Iterator[str]:
    """Markdown: the smallest bound that keeps the trainer busy, a row for each size."""
    yield (
        "| devices | no failures | failures, restarts | failures, healing "
        f"| `replay={REPLAY}`: no failures | failures, restarts | failures, healing |"
    )
    yield "|---:" * 7 + "|"
    for devices in dict.fromkeys(row.devices for row in rows):
        same = [row for row in rows if row.devices == devices]
        shares = {row.bound_steps: (*row.trains(is_replayed=False), *row.trains(is_replayed=True)) for row in same}
        least = [min((bound for bound in shares if shares[bound][i] >= GOAL), default=None) for i in range(6)]
        most = [max(each[i] for each in shares.values()) for i in range(6)]
        cells = [
            f"none: {share:.0%}" if bound is None else f"{bound}" for bound, share in zip(least, most, strict=True)
        ]
        yield f"| {devices:,} | " + " | ".join(cells) + " |"


def main(
    steps: Annotated[int, typer.Option(help="Trainer steps that count.", min=1)] = 12,
    most_devices: Annotated[int, typer.Option(help="Larger sizes are left out.")] = max(DEVICES),
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = Path("docs/planner.md"),
) -> None:
    """Simulate every size under every bound (about half an hour)."""
    with_section(page.read_text(), SECTION, "")  # a page without the section is refused before the work, not after it
    sizes = [devices for devices in DEVICES if devices <= most_devices]
    rows = []
    for devices in sizes:
        for bound in BOUNDS:
            rows.append(Row.of(devices, bound, steps))
            Console().print(f"{devices} devices, bound {bound}: {_cells(rows[-1].trains(is_replayed=False))}")
    said = f"`python -m benchmarks.plan_study`, {steps} steps of each, seed 0 ({processor()})."
    tried = f"{', '.join(map(str, BOUNDS[:-1]))} or {BOUNDS[-1]}"
    answered = (
        f"{said} The smallest bound of {tried} trainer steps under which the trainer trains {GOAL:.0%} of the time:"
    )
    told = f"All that was simulated; {GOAL:.0%} or more bold:"
    replace_section(page, SECTION, "\n".join((answered, "", *answers(rows), "", told, "", *details(rows))))
    Console().print(f"written: {page}")


if __name__ == "__main__":
    typer.run(main)
