"""The disturbance of `disturbance.py` through verl itself: real Ray, TransferQueue, FSDP2 and vLLM, in `bounded_async`.

Rewards take `VERIFIER_S` seconds, slept, so that a low bound makes the trainer wait. Everything else is as in
`verl_runs.py`.
"""

import json
from pathlib import Path

from pages import replace_section
from rich.console import Console

from staleness_study import disturbed
from staleness_study.disturbance import BOUND_UPDATES, CONDITIONS, KEPT, Run, Schedule, described, load, table
from staleness_study.verl_runs import SIZE
from verl_m2po.cli import quickstart
from verl_m2po.one_process.setup import RECIPE, base_model
from verl_m2po.tasks import arithmetic

SCHEDULE = Schedule(steps=90, begins=26, ends=51)
UPDATES_PER_STEP = 8
VERIFIER_S = 8.0
SECTION = "disturbance-verl"
MOVES = {
    "lowered, too much masked": "staleness/bound_lowered_by_masking",
    "lowered, second moment above its target": "staleness/bound_lowered_by_second_moment",
    "raised": "staleness/bound_raised",
}
KEPT_OF_VERL = KEPT | {"waited_s": "staleness/trainer_idle_s", "step_s": "timing_s/step"} | MOVES


def overrides(condition: str, folder: Path, schedule: Schedule) -> tuple[str, ...]:
    """Hydra overrides beside the quickstart's."""
    agent, optim = "actor_rollout_ref.rollout.agent", "actor_rollout_ref.actor.optim"
    begins, ends = ((step - 1) * UPDATES_PER_STEP for step in (schedule.begins, schedule.ends))
    return (
        *SIZE,
        *CONDITIONS[condition],
        f"{optim}.optimizer_impl=staleness_study.disturbed",
        f"{optim}.optimizer=DisturbedAdamW",
        f"{optim}.override_optimizer_config={{begins:{begins},ends:{ends},factor:{schedule.factor}}}",
        f"{agent}.agent_loop_config_path={folder / 'agent_loop.yaml'}",
        f"{agent}.default_agent_loop={disturbed.NAME}",
        # All that may be in flight at the largest bound
        f"actor_rollout_ref.rollout.max_num_seqs={(BOUND_UPDATES // UPDATES_PER_STEP + 1) * 16 * 8}",
        f"trainer.total_training_steps={schedule.steps}",
        "trainer.test_freq=25",
        "trainer.val_before_train=false",
        "trainer.logger=[file]",
        "ray_kwargs.ray_init.address=local",
    )


class VerlRun(quickstart.Run):
    """The quickstart's, with the study's config."""

    @property
    def name(self) -> str:
        return self.out.name

    def command(self, model: Path, data: Path) -> list[str]:
        """The command that trains."""
        words = super().command(model, data)
        return [word.replace("--config-name=arithmetic", "--config-name=arithmetic_staleness") for word in words]


def train(condition: str, seed: int, schedule: Schedule, out: Path, console: Console) -> Run:
    """One run through verl, with the loss m2po."""
    folder = (out / f"{condition}-seed{seed}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    disturbed.write_config(str(folder / "agent_loop.yaml"), VERIFIER_S)
    run = VerlRun(folder, schedule.steps, "m2po", seed, overrides(condition, folder, schedule))
    data = folder / "data"
    arithmetic.write_parquet(data, train_rows=quickstart.TRAINING_ROWS, validation_rows=256, digits=RECIPE.digits)
    if status := quickstart.train(run, run.command(base_model().absolute(), data), console):
        raise RuntimeError(f"{condition}, seed {seed}: exit status {status}, see {run.folder / 'console.log'}")
    return read(condition, seed, run.metrics)


def read(condition: str, seed: int, log: Path) -> Run:
    """From verl's log."""
    rows = [row["data"] for row in quickstart.read_log(log)]
    # A metric of the bound is there where it moves; a fixed one is where it was.
    absent = {"bound_updates": float(BOUND_UPDATES)}
    series = {
        name: [round(float(row.get(metric, absent.get(name, 0.0))), 6) for row in rows]
        for name, metric in KEPT_OF_VERL.items()
    }
    accuracy = {i: row[quickstart.ACCURACY] for i, row in enumerate(rows, 1) if quickstart.ACCURACY in row}
    return Run(condition, seed, series, accuracy)


def write(path: Path, page: Path) -> None:
    """Put the table of the runs in `path`, and when and why the bound moved, into the marked section of `page`."""
    content = json.loads(path.read_text())
    schedule, runs = Schedule(**content["schedule"]), load(path)
    said = described("disturbance --verl", "eight updates", content["machine"], runs, schedule)
    told = "\n".join(moves(each, schedule) for each in runs if each.condition == "adaptive")
    replace_section(page, SECTION, f"{said}\n\n{table(runs, schedule)}\n\n{told}")


def moves(run: Run, schedule: Schedule) -> str:
    """Markdown: the trainer steps after which the bound moved and why, and the bound meanwhile."""
    found = []
    for name in MOVES:
        steps = [str(step) for step, moved in enumerate(run.series[name], 1) if moved]
        found.append(f"{name} after {', '.join(steps) if steps else 'no step'}")
    bounds = " ".join(f"{bound:.0f}" for bound in run.series["bound_updates"][schedule.begins - 1 :])
    return f"Seed {run.seed}: {'; '.join(found)}. The bound from step {schedule.begins} on: {bounds}."
