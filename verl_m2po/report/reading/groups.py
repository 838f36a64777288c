"""Group the runs that differ in their seed only, and align them by step."""

import json
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace

import pandas as pd

from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.runs import Run

# Config keys that do not make another experiment: seeds and names, where a run writes, and how long and how often.
# Places are named one by one, because a path that a run reads (model, data, reward function) is what it was.
SEED_KEY = re.compile(r"(^|[._])seed$")
NOT_THE_METHOD = re.compile(
    SEED_KEY.pattern
    + r"|(^|[._])(experiment_name|project_name|resume_[a-z_]+|total_training_steps|total_epochs|save_freq|test_freq"
    r"|logger)$"
    r"|(^|\.)(default_local_dir|default_hdfs_dir|rollout_data_dir|validation_data_dir|output_dir|log_dir|dump_dir"
    r"|_temp_dir|ledger_path|journal_path|save_path|timeline_json_file|ssd_offload\.path|VERL_FILE_LOGGER_PATH"
    r"|TENSORBOARD_DIR)$"
    r"|^hydra\."
)


@dataclass(frozen=True)
class Group:
    """Runs of one method at one staleness, one per seed.

    Args:
        label: Unique among the groups of a report; what figures and tables call it.
        runs: At least one.
        loss: Field name of the loss; None if unknown.
        staleness_updates: Age of the data in optimizer updates, 0 for on-policy; None if unknown.
        threshold: M2PO's limit on the second moment; None if unknown.
    """

    label: str
    runs: tuple[Run, ...]
    loss: str | None = None
    staleness_updates: int | None = None
    threshold: float | None = None

    @property
    def logged(self) -> set[str]:
        """Metrics that at least one of the runs logged."""
        return set().union(*(run.logged for run in self.runs))


@dataclass(frozen=True)
class Seeds:
    """One metric over the seeds of a group, by step.

    Args:
        mean, low, high: Over seeds, by trainer step; steps at which all have a value, up to the end of the shortest.
        tail: Mean over the seeds that are left, after the shortest ended; starts where `mean` ends.
        count: Seeds that logged the metric at all.
    """

    mean: pd.Series
    low: pd.Series
    high: pd.Series
    tail: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    count: int = 1


def over_seeds(series: list[pd.Series]) -> Seeds:
    """Align `series` by step. Nothing is interpolated: a step counts where every seed has a value.

    Seeds that share no step are averaged over whichever are there.
    """
    series = [one for one in series if len(one)]
    if not series:
        empty = pd.Series(dtype=float)
        return Seeds(empty, empty, empty, count=0)
    table = pd.concat(series, axis=1).sort_index()
    complete = table.dropna()
    if not len(complete):
        complete = table
    rest = table[table.index >= complete.index[-1]]
    tail = rest.mean(axis=1) if len(rest) > 1 else pd.Series(dtype=float)
    if len(tail):
        tail.iloc[0] = complete.mean(axis=1).iloc[-1]
    return Seeds(complete.mean(axis=1), complete.min(axis=1), complete.max(axis=1), tail, len(series))


def seeds_of(group: Group, names: tuple[str, ...]) -> Seeds:
    """The first of `names` that each run of the group logged, over its seeds."""
    found = [(run, metrics.first_logged(run.logged, names)) for run in group.runs]
    return over_seeds([run.series(name) for run, name in found if name])


def _fingerprint(config: dict[str, object]) -> str:
    return json.dumps({key: config[key] for key in sorted(config) if not NOT_THE_METHOD.search(key)}, default=str)


def _key(run: Run) -> tuple:
    known = run.settings
    fingerprint = _fingerprint(known.config) if known.config else None
    # A name without a seed, such as a date, need not be the same for all seeds: there the config alone decides.
    by_config = known.config and known.base_name == run.name
    return (None if by_config else known.base_name, known.loss, known.staleness_updates, fingerprint)


def seeds_of_run(run: Run) -> tuple:
    """All that is known of a run's seeds; runs of one group in which it is equal may be copies of each other."""
    config = run.settings.config
    return (run.settings.seed, *((key, str(config[key])) for key in sorted(config) if SEED_KEY.search(key)))


def _label(run: Run) -> str:
    known = run.settings
    if known.loss is None:
        return known.base_name
    if known.staleness_updates is None:
        return f"{known.loss}, {known.mode}" if known.mode else known.base_name
    return f"{known.loss}, on-policy" if known.staleness_updates == 0 else f"{known.loss}, s={known.staleness_updates}"


def _differing(groups: list[Group]) -> list[str]:
    """Config keys, at most two, in which groups of the same label differ."""
    configs = [group.runs[0].settings.config for group in groups]
    keys = sorted(set().union(*configs))
    differ = [key for key in keys if len({json.dumps(config.get(key), default=str) for config in configs}) > 1]
    return [key for key in differ if not NOT_THE_METHOD.search(key)][:2]


def _tell_apart(groups: list[Group]) -> list[Group]:
    """Labels made unique: by the config keys that differ, else by the runs' names."""
    by_label = defaultdict(list)
    for group in groups:
        by_label[group.label].append(group)
    labels: dict[int, str] = {}
    for label, same in by_label.items():
        keys = _differing(same) if len(same) > 1 else []
        for group in same:
            config = group.runs[0].settings.config
            extra = ", ".join(f"{'.'.join(key.split('.')[-2:])}={config.get(key)}" for key in keys)
            labels[id(group)] = label if len(same) == 1 else f"{label} ({extra or group.runs[0].settings.base_name})"
    if len(set(labels.values())) < len(groups):
        # Still alike, as with copies of one run: the runs' own names are unique.
        taken = [labels[id(group)] for group in groups]
        for group in groups:
            if taken.count(labels[id(group)]) > 1:
                labels[id(group)] = f"{group.label} ({group.runs[0].name})"
    return [replace(group, label=labels[id(group)]) for group in groups]


def group_runs(runs: list[Run]) -> list[Group]:
    """Runs that differ in their seed only, together; on-policy first, then by staleness and loss."""
    members = defaultdict(list)
    for run in runs:
        members[_key(run)].append(run)
    groups = []
    for same in members.values():
        known = same[0].settings
        runs_by_seed = sorted(same, key=lambda run: (run.settings.seed is None, run.settings.seed or 0, run.name))
        groups.append(Group(_label(same[0]), tuple(runs_by_seed), known.loss, known.staleness_updates, known.threshold))

    def order(group: Group) -> tuple:
        unknown = group.staleness_updates is None
        return (unknown, group.staleness_updates or 0, group.loss or "", group.label)

    return _tell_apart(sorted(groups, key=order))


def tasks_of(groups: list[Group], metric: str | None = None) -> dict[str, dict[str, str]]:
    """Task to run name to the metric that measures the result there.

    Args:
        groups: All groups of the report.
        metric: A metric to take as the result instead of the validation accuracy; None for the validation accuracy,
            or, where no run logged one, the mean training score.
    """
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        found = {metric: metric} if metric in run.logged else {} if metric else metrics.validation_metrics(run.logged)
        for task, name in found.items():
            tasks[task][run.name] = name
    if not tasks and metric is None:
        for run in runs:
            if metrics.TRAINING_SCORE in run.logged:
                tasks[metrics.TRAINING_SCORE][run.name] = metrics.TRAINING_SCORE
    return dict(sorted(tasks.items()))


def result_seeds(group: Group, task: dict[str, str]) -> Seeds:
    """The result metric of one task over the seeds of a group."""
    return over_seeds([run.series(task[run.name]) for run in group.runs if run.name in task])
