"""What a trainer step costs with each method of the comparison: side by side in one process, on equally old data."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pages import processor

from staleness_study.plan import Job

BASE = "grpo"
# Four trainer steps: no method is costlier on older data.
STALENESS_UPDATES = 16
# Until the data is that old; torch has allocated what it needs by then.
WARM_UP = 4


@dataclass(frozen=True)
class StepTimes:
    """Medians of a measurement.

    Args:
        seconds: Processor time of a trainer step by method, in seconds.
        steps: Trainer steps of each that count.
        machine: Where it was measured.
        day: When.
    """

    seconds: Mapping[str, float]
    steps: int
    machine: str
    day: str

    @staticmethod
    def load(path: Path) -> "StepTimes | None":
        """What `write` wrote; None where there is no file."""
        return StepTimes(**json.loads(path.read_text())) if path.exists() else None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(vars(self), indent=1) + "\n")

    def against_base(self, loss: str) -> float | None:
        """How many times as long as with `BASE`; None where it was not measured."""
        return self.seconds[loss] / self.seconds[BASE] if loss in self.seconds else None

    @property
    def provenance(self) -> str:
        """Where the numbers come from, in a sentence."""
        return (
            f"Step time: processor time of a trainer step on data {STALENESS_UPDATES} updates old as a multiple of "
            f"GRPO's {self.seconds[BASE]:.3f} s, median of {self.steps} steps in turns in one process, one thread, "
            f"seed 1 (`python -m staleness_study step-times`, {self.day}, {self.machine})."
        )


def in_turns(
    steps: Mapping[str, Callable[[int], object]], count: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of `count` calls of each of `steps`, which take the number of the trainer step (from 1).

    In turns, so that all see the same machine; `WARM_UP` further ones before do not count.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1, WARM_UP + count + 1):
        for name, step in steps.items():
            began = clock()
            step(number)
            taken[name].append(clock() - began)
    return {name: statistics.median(times[WARM_UP:]) for name, times in taken.items()}


def measure(losses: Sequence[str], count: int) -> StepTimes:
    """`count` trainer steps with the preset of each of `losses`, from the shipped base model."""
    import torch

    torch.set_num_threads(1)
    benches = {loss: _bench(Job("step_times", loss, STALENESS_UPDATES, 1, steps=WARM_UP + count)) for loss in losses}
    seconds = in_turns({loss: bench.step for loss, bench in benches.items()}, count)
    return StepTimes(seconds, count, processor(), str(date.today()))


def _bench(job: Job):
    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process import train

    setup = setups.read([*job.all_overrides, f"trainer.total_training_steps={job.steps}"], job.config)
    return train.Bench(setup, setups.base_model(setup.recipe), setup.recipe.digits)
