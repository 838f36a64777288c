"""The results of the study as one small JSON file, from which its page and figures are made without the logs."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from staleness_study.plan import STALEST, Job
from verl_m2po.report.reading.summary import collapse_step

# Validations that make the final accuracy.
FINAL_POINTS = 4
# Variant of a run through verl whose rollout has devices of its own.
SEPARATE = "separate"
# Curve of the timed runs: seconds of all trainer steps so far
SECONDS = "seconds"
# Curve of the runs through verl, whose validation is coarse: share of right responses in the training batches
SCORE = "training_score"
# Its last means, two of ten trainer steps each
FINAL_SCORES = 2
# Curve of the stage `replay`: prompts that were generated so far
PROMPTS = "prompts"
# Of the records of runs that share a table
SHARED = ("config", "model", "versions")


@dataclass(frozen=True)
class Result:
    """What is kept of one run.

    Args:
        stage: Part of the study.
        loss: Option of the Hydra group ``loss``.
        staleness_updates: Age of the data in optimizer updates.
        updates_per_step: Optimizer updates in a trainer step.
        seed: Of prompts and rollouts.
        variant: What else distinguishes it; empty for nothing.
        steps: Trainer steps with a validation.
        accuracy: Probability of a right response there.
        curves: By the names of `collect.CURVES`: means over the trainer steps up to each validation but the first.
        seconds: Seconds of its trainer steps.
    """

    stage: str
    loss: str
    staleness_updates: int
    updates_per_step: int
    seed: int
    variant: str
    steps: list[int]
    accuracy: list[float]
    curves: dict[str, list[float]]
    seconds: float

    @property
    def ramp(self) -> int:
        """Trainer steps until the data is as old as it should be; the batches before are of the base model."""
        return self.staleness_updates // self.updates_per_step

    @property
    def series(self) -> pd.Series:
        """Accuracy by trainer step."""
        return pd.Series(self.accuracy, index=self.steps)

    @property
    def final(self) -> float:
        """Mean of the last validations."""
        return float(np.mean(self.accuracy[-FINAL_POINTS:]))

    @property
    def best(self) -> float:
        return max(self.accuracy)

    @property
    def final_score(self) -> float | None:
        """Mean training score of the last 20 trainer steps; None where it is not kept."""
        return float(np.mean(self.curves[SCORE][-FINAL_SCORES:])) if SCORE in self.curves else None

    @property
    def collapse_step(self) -> int | None:
        return collapse_step(self.series)

    @property
    def left_out_name(self) -> str:
        """Which of the curves is the share of tokens without gradient: M2PO masks, the others clip."""
        return "clipped" if "clipped" in self.curves else "masked"

    def until(self, last: int) -> "Result":
        """What a run of `last` trainer steps would have been; the seconds stay those of all steps."""
        kept = sum(step <= last for step in self.steps)
        curves = {name: values[: kept - 1] for name, values in self.curves.items()}
        return replace(self, steps=self.steps[:kept], accuracy=self.accuracy[:kept], curves=curves)

    def first_reaching(self, target: float, points: int = FINAL_POINTS) -> int | None:
        """Step of the first validation that brings the mean of the last `points` to `target`; None for none."""
        means = self.series.rolling(points).mean()
        reached = means.index[means >= target]
        return int(reached[0]) if len(reached) else None

    def seconds_at(self, step: int) -> float:
        """Seconds of the trainer steps up to the validation at `step`, without validations. For timed runs."""
        return [0.0, *self.curves[SECONDS]][self.steps.index(step)]

    def mean(self, curve: str) -> float:
        """Mean of a curve after the ramp, without NaN; NaN where the run is not that long or the curve not kept."""
        known = zip(self.steps[1:], self.curves[curve], strict=True) if curve in self.curves else ()
        values = [value for at, value in known if at > self.ramp and not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")


def merge(data: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """`data` with those runs of `kept` that it does not have or has not got as far with, and the machines of both.

    Args:
        data: What `collect` returned.
        kept: What `write` wrote earlier, of the same settings and versions.

    Raises:
        ValueError: Configuration, model or versions differ, so that the runs must not share a table.
    """
    for key in SHARED:
        if data.get(key) != kept.get(key):
            raise ValueError(
                f"the runs to keep differ in {key!r}: {kept.get(key)}, and the new ones have {data.get(key)}; run the "
                "study anew, or in the environment of the old runs"
            )
    both = sorted((Result(**run) for run in [*kept["runs"], *data["runs"]]), key=lambda run: run.steps[-1])
    runs = {_key(run): run for run in both}
    machines = " and ".join(source["machine"] for source in (kept, data) if "machine" in source)
    machine = {"machine": " and ".join(dict.fromkeys(machines.split(" and ")))} if machines else {}
    return data | machine | {"runs": plain(runs.values())}


def without_known(jobs: Iterable[Job], path: Path) -> list[Job]:
    """Those of `jobs` that the results in the file `path` lack, or have with another number of trainer steps.

    Raises:
        FileNotFoundError: There is no such file.
    """
    known = {(_key(result), result.steps[-1]) for result in load(path)[1]}
    return [job for job in jobs if (_key(job), job.steps) not in known]


def _key(run: Result | Job) -> tuple[str, str, int, str, int]:
    """What makes a run one of its own."""
    return (run.stage, run.loss, run.staleness_updates, run.variant, run.seed)


def plain(results: Iterable[Result | None]) -> list[dict[str, Any]]:
    known = sorted((result for result in results if result is not None), key=_order)
    return [{field.name: getattr(result, field.name) for field in fields(result)} for result in known]


def _order(result: Result) -> tuple:
    return (result.stage, result.staleness_updates, result.loss, result.variant, result.seed)


def write(data: dict[str, Any], path: Path) -> None:
    """JSON with a line for each run, so that a later run changes its own line only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    common = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in data.items() if key != "runs"]
    runs = ",\n".join(f"  {json.dumps(_without_nan(run), allow_nan=False)}" for run in data["runs"])
    path.write_text("{\n" + ",\n".join([*common, f' "runs": [\n{runs}\n ]']) + "\n}\n")


def _without_nan(run: dict[str, Any]) -> dict[str, Any]:
    """A plain run with None for NaN, which JSON does not have."""

    def cleaned(values: list[float]) -> list[float | None]:
        return [None if np.isnan(value) else value for value in values]

    return run | {
        "accuracy": cleaned(run["accuracy"]),
        "curves": {name: cleaned(values) for name, values in run["curves"].items()},
    }


def _with_nan(run: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_without_nan`."""

    def restored(values: list[float | None]) -> list[float]:
        return [float("nan") if value is None else value for value in values]

    return run | {
        "accuracy": restored(run["accuracy"]),
        "curves": {name: restored(values) for name, values in run["curves"].items()},
    }


def load(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write` wrote: the common part, and the results."""
    data = json.loads(path.read_text())
    data["runs"] = [_with_nan(run) for run in data["runs"]]
    return data, [Result(**run) for run in data["runs"]]


def select(results: Sequence[Result], stage: str, loss: str, staleness_updates: int, variant: str = "") -> list[Result]:
    """The seeds of one condition."""
    wanted = (stage, loss, staleness_updates, variant)
    return [r for r in results if (r.stage, r.loss, r.staleness_updates, r.variant) == wanted]


def by_accuracy(results: Sequence[Result], stage: str, losses: Iterable[str]) -> list[str]:
    """Those of `losses` that have run on the stalest data in `stage` as published, the best first."""
    finals = {
        loss: float(np.mean([run.final for run in runs]))
        for loss in losses
        if (runs := select(results, stage, loss, STALEST))
    }
    return sorted(finals, key=lambda loss: (-finals[loss], loss))
