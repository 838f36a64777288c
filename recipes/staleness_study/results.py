"""The results of the study as one small JSON file, from which its page and figures are made without the logs."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from staleness_study import exact, replay_plan
from staleness_study.plan import REPLAY_CLOCK, WALL_CLOCK, Job
from staleness_study.run import CONFIG_FILES, LOG, RECORD, is_whole
from staleness_study.verl_runs import REPLAY_CLOCK as CONDITIONS
from staleness_study.verl_runs import Condition, VerlRun
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.runs import Run, read_runs
from verl_m2po.report.reading.summary import collapse_step

# Validations that make the final accuracy.
FINAL_POINTS = 4
# For an interval that says anything
LEAST_SEEDS = 3
# Variant of a run through verl whose rollout has devices of its own.
SEPARATE = "separate"
MINI_BATCH_SIZE = "actor_rollout_ref.actor.ppo_mini_batch_size"
# Curve of the timed runs: seconds of all trainer steps so far
SECONDS = "seconds"
# Curve of the runs through verl, whose validation is coarse: share of right responses in the training batches
SCORE = "training_score"
# Its last means, two of ten trainer steps each
FINAL_SCORES = 2
# Curve of the stage `replay`: prompts that were generated so far
PROMPTS = "prompts"
ADMITTED = "staleness/admitted"
# Of the records of runs that share a table
SHARED = ("config", "model", "versions")
# Metrics that are kept as means over the trainer steps since the validation before.
CURVES = {
    "masked": metrics.MASKED_FRACTION,
    "clipped": metrics.CLIP_FRACTION,
    "second_moment": metrics.SECOND_MOMENT_BEFORE,
    "gradient_norm": "actor/grad_norm",
    "effective": metrics.EFFECTIVE_SAMPLE_SIZE,
}


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
        curves: By the names of `CURVES`: means over the trainer steps up to each validation but the first.
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


def _rounded(values: Iterable[float], digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _curves(run: Run, steps: list[int], wanted: dict[str, str]) -> dict[str, list[float]]:
    """Means between the validations at `steps` of the metrics in `wanted`."""
    curves = {}
    for name, metric in wanted.items():
        if metric in run.logged:
            series = run.series(metric).loc[steps[0] + 1 : steps[-1]]
            means = series.groupby(pd.cut(series.index, steps, labels=False)).mean()
            # A window without a number is NaN, not left out.
            curves[name] = _rounded(means.reindex(range(len(steps) - 1)), 4)
    if "clipped" in curves:
        # What a loss that clips would have masked is 0 by definition.
        curves.pop("masked", None)
    return curves


def _accuracy(run: Run, folder: Path) -> pd.Series:
    """By trainer step: of its checkpoints where these were measured, of its validations elsewhere."""
    if measured := exact.read(folder):
        return pd.Series(measured, dtype=float).sort_index()
    names = [name for name in sorted(run.logged) if metrics.VALIDATION.match(name)]
    return run.series(names[0]) if names else pd.Series(dtype=float)


def _seconds(run: Run, steps: list[int]) -> list[float]:
    """Seconds of the trainer steps up to each of `steps` but the first; verl's step time is without validation."""
    return _rounded(run.series("timing_s/step").cumsum().loc[steps[1:]], 5)


def _updates_per_step(config: Mapping[str, object]) -> int:
    batch, mini_batch, epochs = (
        int(str(config[key]))
        for key in ("data.train_batch_size", MINI_BATCH_SIZE, "actor_rollout_ref.actor.ppo_epochs")
    )
    return batch // mini_batch * epochs


def _read(
    folder: Path, stage: str, variant: str = "", most: int | None = None, loss: str | None = None
) -> Result | None:
    """What is kept of the run in `folder`, up to trainer step `most`; None before its second validation.

    Its loss is `loss`, None: as its log says.
    """
    runs, _ = read_runs([folder])
    if not runs:
        return None
    run = runs[0]
    accuracy = _accuracy(run, folder).loc[:most]
    if len(accuracy) < 2:
        return None
    steps, known = accuracy.index.tolist(), run.settings
    times = {SECONDS: _seconds(run, steps)} if stage in (WALL_CLOCK, REPLAY_CLOCK) else {}
    if stage == replay_plan.STAGE:
        times = {PROMPTS: [float(run.series(ADMITTED).loc[:step].sum()) for step in steps[1:]]}
    wanted = CURVES | ({SCORE: metrics.TRAINING_SCORE} if stage == "verl" else {})
    return Result(
        stage,
        loss or known.loss or "unknown",
        known.staleness_updates or 0,
        _updates_per_step(known.config),
        known.seed or 0,
        SEPARATE if (known.mode or "").endswith("_separate") else variant,
        steps,
        _rounded(accuracy, 4),
        _curves(run, steps, wanted) | times,
        round(float(run.series("timing_s/step").loc[:most].sum()), 1),
    )


def collect(jobs: Iterable[Job], out: Path) -> dict[str, Any]:
    """Those of `jobs` that are finished under `out` as plain data, with what they have in common."""
    done = [job for job in jobs if is_whole(job, out)]
    if not done:
        raise FileNotFoundError(f"no finished run of the study in {out}: run `python -m staleness_study run` first")
    common = _common({str(job.folder(out)): json.loads((job.folder(out) / RECORD).read_text()) for job in done})
    results = [_read(job.folder(out), job.stage, job.variant, job.steps, job.loss) for job in done]
    return common | {"runs": _plain(results)}


def _common(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the runs, by their folders, share; of the machines the first.

    Raises:
        ValueError: Two runs were made with different versions, models or configs, and must not share a table.
    """
    first_with: dict[tuple[str, ...], tuple[str, Any]] = {}
    for name, record in records.items():
        for key in (*SHARED, "config_files"):
            # The first runs' records are older than the hash of the config files, which is that of the chosen options.
            if key not in record:
                continue
            alike = (key, *(_options(record) if key == "config_files" else ()))
            other, wanted = first_with.setdefault(alike, (name, record[key]))
            if record[key] != wanted:
                raise ValueError(f"{other} has {key} {wanted}, and {name} has {record[key]}: run one of them anew")
    first = next(iter(records.values()))
    return {key: first[key] for key in (*SHARED, "machine")}


def _options(record: dict[str, Any]) -> Iterator[str]:
    """The options of config groups that a run chose."""
    for override in record["overrides"]:
        group = override.partition("=")[0]
        if (CONFIG_FILES / group).is_dir():
            yield override


def collect_verl(out: Path, stage: str = "verl") -> dict[str, Any]:
    """The runs through verl under `out`, also those that are not finished."""
    results = [_read(path.parent, stage) for path in sorted(out.glob(f"*/{LOG}"))]
    return {"runs": _plain(results)}


def collect_replay_clock(out: Path, seeds: Iterable[int]) -> dict[str, Any]:
    """The timed runs of replay through verl under `out`, also those that are not finished."""
    runs = [(condition, VerlRun.next_attempt(out, condition, seed, 0)) for condition in CONDITIONS for seed in seeds]
    there = [(condition, run.folder) for condition, run in runs if (run.folder / LOG).exists()]
    return {"runs": _plain(_read(folder, REPLAY_CLOCK, variant_of(condition)) for condition, folder in there)}


def variant_of(condition: Condition) -> str:
    """Name of a timed run of replay beside its loss and age."""
    return " ".join(filter(None, condition[1:]))


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
    return data | machine | {"runs": _plain(runs.values())}


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


def _plain(results: Iterable[Result | None]) -> list[dict[str, Any]]:
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


def of_method(results: Sequence[Result], loss: str, staleness_updates: int) -> list[Result]:
    """The seeds of one method at one age, whichever stage they are run for."""
    return select(results, "staleness", loss, staleness_updates) + select(results, "methods", loss, staleness_updates)


def by_accuracy(results: Sequence[Result], staleness_updates: int) -> list[str]:
    """The methods that have run on data of that age, the best first."""
    finals = {
        loss: float(np.mean([run.final for run in runs]))
        for loss in {run.loss for run in results if run.stage in ("staleness", "methods")}
        if (runs := of_method(results, loss, staleness_updates))
    }
    return sorted(finals, key=lambda loss: (-finals[loss], loss))


def student_t(freedom: int) -> float:
    """97.5% quantile of Student's t with that many degrees of freedom."""
    return float(stats.t.ppf(0.975, freedom))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half width of its 95% interval (Student's t); NaN for a single seed."""

    mean: float
    half_width: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval | None":
        """None for no seed."""
        if not values:
            return None
        count = len(values)
        if count == 1:
            return cls(float(values[0]), float("nan"), 1)
        t = student_t(count - 1)
        return cls(float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(count)), count)


def recovered_gap(
    method: Sequence[float], grpo: Sequence[float], reference: Sequence[float]
) -> tuple[float, float, float] | None:
    """Share of GRPO's gap to on-policy training that `method` recovers, with a 95% interval over seeds.

    The interval is that of a ratio of differences of means (delta method) with Student's t and Welch's degrees of
    freedom; three to five seeds are too few for a bootstrap, whose intervals come out too narrow.

    Args:
        method: Final accuracies of the method on stale data.
        grpo: Of GRPO on the same.
        reference: Of on-policy training.

    Returns:
        Share, lower and upper end; None where one of them has fewer than `LEAST_SEEDS` seeds or GRPO has no gap.
    """
    gap = float(np.mean(reference) - np.mean(grpo)) if len(reference) and len(grpo) else 0.0
    if min(len(method), len(grpo), len(reference)) < LEAST_SEEDS or gap <= 0:
        return None
    share = float(np.mean(method) - np.mean(grpo)) / gap
    # Derivative of the share by each of the three means, times the gap
    parts = [
        (factor**2 * float(np.var(values, ddof=1)) / len(values), len(values) - 1)
        for factor, values in ((1.0, method), (1 - share, grpo), (share, reference))
    ]
    variance = sum(part for part, _ in parts)
    # Rounded down, which errs on the wide side
    freedom = int(variance**2 / sum(part**2 / degrees for part, degrees in parts)) if variance else 1
    half_width = student_t(freedom) * float(np.sqrt(variance)) / gap
    return share, share - half_width, share + half_width


def difference(method: Sequence[Result], other: Sequence[Result]) -> Interval | None:
    """By how much the final accuracy of `method` is above that of `other` on the same seeds; None for no such seed."""
    of_other = {run.seed: run.final for run in other}
    return Interval.of([run.final - of_other[run.seed] for run in method if run.seed in of_other])
