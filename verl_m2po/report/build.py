"""From paths to a report: runs, groups, table, and a line for each thing that is not there."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, group_runs, seeds_of_run, tasks_of
from verl_m2po.report.reading.runs import Run, read_runs
from verl_m2po.report.reading.summary import Summary, summarise

MOST_STEPS_NAMED = 3
# Metrics that the figures and the table use; a NaN in any other is not worth a line.
WATCHED = {name for panel in (*metrics.HEALTH, *metrics.BUFFER) for name in panel.metrics} | {
    metrics.MASKED_FRACTION,
    metrics.CLIP_FRACTION,
    metrics.SECOND_MOMENT_BEFORE,
    metrics.SECOND_MOMENT_AFTER,
    metrics.THROUGHPUT,
    *metrics.STEP_SECONDS,
}


@dataclass(frozen=True)
class Report:
    """What was read.

    Args:
        groups: Runs that differ in their seed only, together.
        tasks: Task to run name to the metric that measures the result there.
        summaries: Rows of the table.
        target: Result whose steps and seconds the table shows; None for none.
        problems: One line for each thing that is missing or wrong.
    """

    groups: list[Group]
    tasks: dict[str, dict[str, str]]
    summaries: list[Summary]
    target: float | None
    problems: list[str]


def _not_finite(run: Run) -> list[str]:
    lines = []
    for name, steps in sorted(run.not_finite.items()):
        if name in WATCHED or metrics.VALIDATION.match(name):
            named = ", ".join(map(str, steps[:MOST_STEPS_NAMED])) + (", ..." if len(steps) > MOST_STEPS_NAMED else "")
            lines.append(f"{run.name}: {name} is NaN or infinite at {len(steps)} step(s): {named}")
    return lines


def _absurd_ages(run: Run) -> list[str]:
    lines = []
    kinds = [pattern.format(kind) for pattern in metrics.AGES for kind in ("min", "mean", "max")]
    for name in sorted(run.logged & set(kinds)):
        steps = [step for step, plausible in metrics.plausible_age(run.series(name)).items() if not plausible]
        if steps:
            lines.append(
                f"{run.name}: {name} is over {metrics.LARGEST_AGE} at {len(steps)} step(s), first at {steps[0]}; they "
                "are not in figure age_of_data"
            )
    for name in sorted(run.logged):
        if (bucket := metrics.AGE_BUCKET.match(name)) and int(bucket["end"]) > metrics.LARGEST_AGE:
            lines.append(f"{run.name}: {name} is of ages over {metrics.LARGEST_AGE} and not in figure age_of_data")
    return lines


def _results(groups: list[Group], tasks: dict[str, dict[str, str]], metric: str | None) -> list[str]:
    lines = []
    if list(tasks) == [metrics.TRAINING_SCORE] and metric is None:
        lines.append(
            "no run logged a validation accuracy (val-core/<source>/acc/mean@k): the result shown is the training "
            f"score {metrics.TRAINING_SCORE}"
        )
    for run in (run for group in groups for run in group.runs):
        if not any(run.name in names for names in tasks.values()):
            lines.append(f"{run.name}: no {metric or 'validation accuracy (val-core/<source>/acc/mean@k)'} logged")
    if len(tasks) > 1:
        lines.append(f"{len(tasks)} tasks, shown apart and never averaged: {', '.join(tasks)}")
    return lines


def _lengths(group: Group) -> list[str]:
    ends = {run.name: int(run.frame.index[-1]) for run in group.runs}
    last = max(ends.values())
    early = [f"{name} ({end})" for name, end in ends.items() if end < last]
    if not early:
        return []
    return [
        f"{group.label}: its seeds end at steps {', '.join(map(str, sorted(ends.values())))}; early ended "
        f"{', '.join(early)}, whose own last values are in the mean of final; lines are dotted after "
        f"{min(ends.values())}"
    ]


def _same_seed(group: Group) -> list[str]:
    """Copies of one run are no seeds, and their deviation says nothing; the reader chooses which to leave out."""
    by_seed = defaultdict(list)
    for run in group.runs:
        by_seed[seeds_of_run(run)].append(run)
    lines = []
    for same in by_seed.values():
        if len(same) > 1:
            seed = same[0].settings.seed
            what = "no known seed" if seed is None else f"the same seed ({seed})"
            named = f"{', '.join(run.name for run in same[:-1])} and {same[-1].name}"
            lines.append(f"{group.label}: runs {named} have {what} and count as {len(same)} seeds")
    return lines


def build(paths: list[Path], target: float | None = None, metric: str | None = None, final_points: int = 1) -> Report:
    """Read the runs at `paths`. Whatever cannot be read becomes a line in `problems`; nothing is raised for it.

    Args:
        paths: Files or folders, see `runs.find_sources`.
        target: Result to reach; None for no target columns.
        metric: Metric to take as the result; None for verl's validation accuracy.
        final_points: How many of the last points make the final value.
    """
    runs, problems = read_runs(paths)
    groups = group_runs(runs)
    tasks = tasks_of(groups, metric)
    summaries = [
        summary
        for task, names in tasks.items()
        for group in groups
        if (summary := summarise(group, task, names, target, final_points)) is not None
    ]
    problems += _results(groups, tasks, metric)
    for group in groups:
        problems += _same_seed(group) + _lengths(group)
        for run in group.runs:
            problems += _not_finite(run) + _absurd_ages(run)
    return Report(groups, tasks, summaries, target, problems)
