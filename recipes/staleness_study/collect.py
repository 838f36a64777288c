"""What is kept of the runs, read from their logs."""

# Pandas annotates wider types than it returns.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from staleness_study import exact, replay_plan
from staleness_study.plan import REPLAY_CLOCK, VERL, VERL_HOT, WALL_CLOCK, Job
from staleness_study.results import PROMPTS, SCORE, SECONDS, SEPARATE, SHARED, Result, plain
from staleness_study.run import CONFIG_FILES, LOG, RECORD, is_whole
from staleness_study.verl_runs import REPLAY_CLOCK as CONDITIONS
from staleness_study.verl_runs import Condition, VerlRun
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.runs import Run, read_runs

MINI_BATCH_SIZE = "actor_rollout_ref.actor.ppo_mini_batch_size"
ADMITTED = "staleness/admitted"
# Metrics that are kept as means over the trainer steps since the validation before.
CURVES = {
    "masked": metrics.MASKED_FRACTION,
    "clipped": metrics.CLIP_FRACTION,
    "second_moment": metrics.SECOND_MOMENT_BEFORE,
    "gradient_norm": "actor/grad_norm",
    "effective": metrics.EFFECTIVE_SAMPLE_SIZE,
}


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
    wanted = CURVES | ({SCORE: metrics.TRAINING_SCORE} if stage in (VERL, VERL_HOT) else {})
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


def collect_bench(jobs: Iterable[Job], out: Path) -> dict[str, Any]:
    """Those of `jobs` that are finished under `out` as plain data, with what they have in common."""
    done = [job for job in jobs if is_whole(job, out)]
    if not done:
        raise FileNotFoundError(f"no finished run of the study in {out}: run `python -m staleness_study run` first")
    common = _common({str(job.folder(out)): json.loads((job.folder(out) / RECORD).read_text()) for job in done})
    results = [_read(job.folder(out), job.stage, job.variant, job.steps, job.loss) for job in done]
    return common | {"runs": plain(results)}


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


def collect_verl(out: Path, stage: str) -> dict[str, Any]:
    """The runs through verl under `out`, also those that are not finished."""
    results = [_read(path.parent, stage) for path in sorted(out.glob(f"*/{LOG}"))]
    return {"runs": plain(results)}


def collect_replay_clock(out: Path, seeds: Iterable[int]) -> dict[str, Any]:
    """The timed runs of replay through verl under `out`, also those that are not finished."""
    runs = [(condition, VerlRun.next_attempt(out, condition, seed, 0)) for condition in CONDITIONS for seed in seeds]
    there = [(condition, run.folder) for condition, run in runs if (run.folder / LOG).exists()]
    return {"runs": plain(_read(folder, REPLAY_CLOCK, variant_of(condition)) for condition, folder in there)}


def variant_of(condition: Condition) -> str:
    """Name of a timed run of replay beside its loss and age."""
    return " ".join(filter(None, condition[1:]))
