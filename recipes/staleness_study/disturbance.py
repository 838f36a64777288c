"""A learning rate ten times as large for a third of a run: a bound that moves beside a fixed one of the same maximum.

Runs on the experiment bench, where rollouts are there at once: every batch is as old as the bound allows, which is the
hardest case for a fixed one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from pages import processor, replace_section

BOUND_UPDATES = 64
CONDITIONS = {
    "fixed": ("staleness=bounded_async", f"trainer.v1.bounded_async.staleness_updates={BOUND_UPDATES}"),
    "adaptive": ("staleness=adaptive", f"trainer.v1.bounded_async.adaptive.max_staleness_updates={BOUND_UPDATES}"),
}
SECTION = "disturbance"
KEPT = {
    "bound_updates": "staleness/bound_updates",
    "age_updates": "staleness/age_updates_mean",
    "masked": "actor/m2po/masked_fraction",
    "second_moment": "actor/m2po/second_moment_before",
    "score": "critic/score/mean",
}
TEST_EVERY = 20
FIRST_STEPS = 10


@dataclass(frozen=True)
class Schedule:
    """Trainer steps, from 1; from `begins` to before `ends` the learning rate is `factor` times as large."""

    steps: int = 120
    begins: int = 41
    ends: int = 81
    factor: float = 10.0

    @property
    def last_steps(self) -> int:
        """Half of the disturbed steps: in them the bound should have adapted."""
        return (self.ends - self.begins) // 2


@dataclass(frozen=True)
class Run:
    """One run: each series has a value for each trainer step, the accuracies {step: share}."""

    condition: str
    seed: int
    series: dict[str, list[float]]
    accuracy: dict[int, float]

    def between(self, name: str, begins: int, ends: int) -> list[float]:
        """The values of a series in the trainer steps from `begins` to before `ends`."""
        return self.series[name][begins - 1 : ends - 1]


def train(condition: str, seed: int, schedule: Schedule) -> Run:
    """One run on the bench, with the loss m2po."""
    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process.train import Bench

    seeds = (f"data.seed={seed}", f"actor_rollout_ref.rollout.seed={seed}")
    overrides = ["loss=m2po", *CONDITIONS[condition], *seeds, f"trainer.total_training_steps={schedule.steps}"]
    bench = Bench(setups.read(overrides), setups.base_model(), setups.RECIPE.digits)
    series: dict[str, list[float]] = {name: [] for name in KEPT}
    accuracy = {0: float(bench.validate()[bench.setup.task.accuracy])}
    for step in range(1, schedule.steps + 1):
        if step in (schedule.begins, schedule.ends):
            bench.learner.multiply_learning_rate(schedule.factor if step == schedule.begins else 1 / schedule.factor)
        metrics = bench.step(step)
        for name, metric in KEPT.items():
            series[name].append(round(float(metrics.get(metric, BOUND_UPDATES)), 6))
        if step % TEST_EVERY == 0:
            accuracy[step] = round(float(bench.validate()[bench.setup.task.accuracy]), 4)
    return Run(condition, seed, series, accuracy)


def run(
    seeds: Sequence[int],
    path: Path,
    schedule: Schedule,
    say: Any,
    train_one: Callable[[str, int, Schedule], Run] = train,
) -> None:
    """All runs that are not in the JSON file `path` yet, each added to it when it has ended."""
    runs = load(path) if path.exists() else []
    done = {(each.condition, each.seed) for each in runs}
    for seed in seeds:
        for condition in CONDITIONS:
            if (condition, seed) in done:
                continue
            runs.append(train_one(condition, seed, schedule))
            save(runs, path, schedule)
            say(f"{condition}, seed {seed}: accuracy {runs[-1].accuracy}")


def save(runs: Sequence[Run], path: Path, schedule: Schedule) -> None:
    """As JSON, which `load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schedule": asdict(schedule), "machine": processor(), "runs": [asdict(each) for each in runs]}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def load(path: Path) -> list[Run]:
    """The runs of the JSON file `path`."""
    runs = json.loads(path.read_text())["runs"]
    return [Run(**{**each, "accuracy": {int(k): v for k, v in each["accuracy"].items()}}) for each in runs]


def table(runs: Sequence[Run], schedule: Schedule) -> str:
    """Markdown: a row for each bound and seed, and their means."""
    last = schedule.ends - 1
    lines = [
        "| bound | seed | bound (updates): before, lowest, end "
        f"| masked: first {FIRST_STEPS} disturbed steps, last {schedule.last_steps}, after "
        f"| accuracy at step {schedule.begins - 1}, {last}, {schedule.steps} |",
        "|---|---:|---:|---:|---:|",
    ]
    for condition in CONDITIONS:
        same = [each for each in runs if each.condition == condition]
        rows = [_numbers(each, schedule) for each in same]
        for each, row in zip(same, rows, strict=True):
            lines.append(f"| {condition} | {each.seed} | {_cells(row)} |")
        if len(rows) > 1:
            lines.append(f"| **{condition}** | mean | {_cells([mean(column) for column in zip(*rows, strict=True)])} |")
    return "\n".join(lines)


def _numbers(run: Run, schedule: Schedule) -> list[float]:
    begins, ends, after = schedule.begins, schedule.ends, schedule.steps + 1
    bounds = run.series["bound_updates"]
    return [
        *(bounds[begins - 2], min(run.between("bound_updates", begins, after)), bounds[-1]),
        *(
            mean(run.between("masked", *each))
            for each in ((begins, begins + FIRST_STEPS), (ends - schedule.last_steps, ends), (ends, after))
        ),
        *(run.accuracy[step] for step in (begins - 1, ends - 1, schedule.steps)),
    ]


def _cells(row: Sequence[float]) -> str:
    bounds, masked, accuracy = row[:3], row[3:6], row[6:]
    parts = ([f"{x:.0f}" for x in bounds], [f"{x:.2%}" for x in masked], [f"{x:.3f}" for x in accuracy])
    return " | ".join(", ".join(part) for part in parts)


def write(path: Path, page: Path) -> None:
    """Put the table of the runs in `path` into the marked section of `page`."""
    content = json.loads(path.read_text())
    schedule, runs = Schedule(**content["schedule"]), load(path)
    said = described("disturbance", "four updates", content["machine"], runs, schedule)
    replace_section(page, SECTION, f"{said}\n\n{table(runs, schedule)}")


def described(command: str, step: str, machine: str, runs: Sequence[Run], schedule: Schedule) -> str:
    """What was run, where."""
    seeds = sorted({each.seed for each in runs})
    said = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    return (
        f"`python -m staleness_study {command}`, {said}, {schedule.steps} trainer steps of {step}, "
        f"learning rate x {schedule.factor:g} in steps {schedule.begins} to {schedule.ends - 1} ({machine}):"
    )
