"""`python -m benchmarks.methods`: every option of the group `loss`, two trainer steps each, on equally stale data.

One run of verl's main on the CPU in the trainer mode `method_tour`. First as many steps of the loss `m2po` as the
staleness takes to build up; then the methods have their turns. With `--sweep` it is what a user would do instead: the
sweep `-m loss=<all of them> staleness=s64`, in which every method starts from the base model in a run of its own.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer
from generate_gallery import compose_run, presets
from omegaconf import OmegaConf
from pages import processor
from rich.console import Console

from verl_m2po.cli.quickstart import read_log
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.tasks import arithmetic, tiny_model

OUT = Path("docs/figures/methods")
# Every process has to know the trainer mode.
ENVIRONMENT = {"VERL_USE_EXTERNAL_MODULES": "benchmarks.plugin"}
STALENESS_UPDATES, STEPS_EACH = 64, 2
PROMPTS, RESPONSES = 8, 4
RAMP_STEPS = STALENESS_UPDATES // PROMPTS
NAMED_BY_LOSS = "trainer.experiment_name=${algorithm.policy_loss_label}"
SERIES = {
    "age_updates": "staleness/age_updates_max",
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    **{
        name: f"{diagnostics.PREFIX}{name}"
        for name in ("second_moment_all", "masked_fraction", "effective_sample_size", "step_scale")
    },
}
# Of the whole run. Small steps: all methods should meet the same policy.
RUN = (
    f"data.train_batch_size={PROMPTS}",
    f"actor_rollout_ref.rollout.n={RESPONSES}",
    # One prompt an update, so that few rollouts make many updates.
    "actor_rollout_ref.actor.ppo_mini_batch_size=1",
    *("actor_rollout_ref.actor.optim.lr=1e-5", "actor_rollout_ref.actor.optim.lr_scheduler_type=constant"),
    "actor_rollout_ref.actor.policy_loss.diagnostics=true",
)


def main(
    sweep: Annotated[
        bool, typer.Option("--sweep", help="A run for each method, in one sweep (an hour); goes on.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON lines, one a method, and a table.")] = OUT,
    folder: Annotated[Path, typer.Option(help="Where the runs write.")] = Path("outputs/methods"),
) -> None:
    """Train with every method, and write what each did to `out`."""
    folder = folder.absolute()
    data = folder / "data"
    arithmetic.write_parquet(data, train_rows=512, validation_rows=32)
    files = {
        "actor_rollout_ref.model.path": tiny_model.build(),
        "data.train_files": data / "train.parquet",
        "data.val_files": data / "validation.parquet",
        "hydra.run.dir": folder / "hydra",
        "hydra.sweep.dir": folder / "hydra",
    }
    status, lines = (_sweep if sweep else _tour)(folder, [f"{key}={value}" for key, value in files.items()])
    name = "sweep" if sweep else "runs"
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (out / f"{name}.md").write_text(table(lines, " --sweep" if sweep else ""))
    failed = [line["method"] for line in lines if line["problems"]]
    Console().print(f"{len(lines)} methods, written to {out}; with problems: {', '.join(failed) or 'none'}")
    raise typer.Exit(bool(status or failed))


def _tour(folder: Path, files: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """One run through all methods; its exit status, and the record of each method."""
    names, methods, log = presets(), folder / "methods.json", folder / "metrics.jsonl"
    write_methods(names, methods)
    status = _train([*overrides(methods, len(names)), *files], {**ENVIRONMENT, "VERL_FILE_LOGGER_PATH": str(log)})
    return status, summaries(names, read_log(log))


def _sweep(folder: Path, files: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """A run for each method that has none in `folder` yet; the sweep's exit status, and the record of each method."""

    def turn(name: str) -> list[dict[str, Any]]:
        log = folder / "m2po-arithmetic" / f"{name}.jsonl"
        return [row["data"] for row in read_log(log)][RAMP_STEPS:]

    status = 0
    if missing := [name for name in presets() if len(turn(name)) < STEPS_EACH]:
        sweep = ["--multirun", f"staleness=s{STALENESS_UPDATES}", f"loss={','.join(missing)}", NAMED_BY_LOSS]
        logs = {"VERL_FILE_LOGGER_ROOT": str(folder)}
        status = _train([*sweep, *common(steps=RAMP_STEPS + STEPS_EACH), *files], logs)
    return status, [summary(name, turn(name)) for name in presets()]


def _train(arguments: Sequence[str], environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--config-name=arithmetic", *arguments, "hardware=cpu"]
    return subprocess.run(command, env={**os.environ, **environment}).returncode


def write_methods(names: Sequence[str], path: Path) -> None:
    """Write what the trainer mode has to know of the methods `names`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: sections(name) for name in names}))


def overrides(methods_path: str | Path, methods: int) -> list[str]:
    """Of the config `arithmetic` with hardware=cpu, for a run through that many methods."""
    settings = {
        "staleness_updates": STALENESS_UPDATES,
        "methods_path": methods_path,
        "first_step": RAMP_STEPS + 1,
        "steps_each": STEPS_EACH,
    }
    return [
        *common(steps=RAMP_STEPS + STEPS_EACH * methods),
        "trainer.v1.trainer_mode=method_tour",
        *(f"+trainer.v1.method_tour.{key}={value}" for key, value in settings.items()),
    ]


def common(steps: int) -> list[str]:
    """Overrides of any run that shows methods at work, of that many trainer steps."""
    return [
        *RUN,
        f"trainer.total_training_steps={steps}",
        *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.logger=[file]"),
        "ray_kwargs.ray_init.address=local",
    ]


def sections(name: str) -> dict[str, Any]:
    """What the preset `name` decides about the loss."""
    config = compose_run("arithmetic", "hardware=cpu", f"loss={name}", *RUN)
    OmegaConf.resolve(config.actor_rollout_ref.actor)
    OmegaConf.resolve(config.algorithm)
    return {
        "algorithm": OmegaConf.to_container(config.algorithm),
        "actor": OmegaConf.to_container(config.actor_rollout_ref.actor),
    }


def summaries(names: Sequence[str], log: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record of each method, in order."""
    rows = [row["data"] for row in log][RAMP_STEPS:]
    turns = [rows[i * STEPS_EACH : (i + 1) * STEPS_EACH] for i in range(len(names))]
    return [summary(name, turn) for name, turn in zip(names, turns, strict=True)]


def summary(name: str, turn: list[dict[str, Any]]) -> dict[str, Any]:
    """Series over the trainer steps of one method's turn, and what is wrong with them."""
    series = {key: [row[metric] for row in turn if metric in row] for key, metric in SERIES.items()}
    return {"method": name, **{key: values for key, values in series.items() if values}, "problems": [*_wrong(turn)]}


def table(lines: Sequence[dict[str, Any]], options: str = "") -> str:
    """`lines` in Markdown; the steps of a turn in one cell.

    Args:
        lines: the records.
        options: of the command that made them.
    """
    columns = [name for name in SERIES if name != "age_updates"]
    page = [
        "# Two trainer steps of every method",
        "",
        f"`python -m benchmarks.methods{options}`, {date.today()}, {processor()}: the tiny model on two-digit "
        f"addition, {PROMPTS} prompts x {RESPONSES} responses and {PROMPTS} optimizer updates a step, data "
        f"{STALENESS_UPDATES} updates old at a step's first update. First / second step; means over the updates of a "
        "step.",
        "",
        "| `loss=` | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for line in lines:
        cells = [" / ".join(f"{value:.3g}" for value in line.get(column, ())) for column in columns]
        page.append(f"| `{line['method']}` | " + " | ".join(cells) + " |")
    return "\n".join(page) + "\n"


def _wrong(turn: list[dict[str, Any]]) -> Iterator[str]:
    if len(turn) != STEPS_EACH:
        yield f"{len(turn)} of {STEPS_EACH} trainer steps"
    for row in turn:
        if row["staleness/age_updates_max"] != STALENESS_UPDATES:
            yield f"{row['staleness/age_updates_max']} updates old"
        yield from (f"{key} is not finite" for key in ("loss", "grad_norm") if not math.isfinite(row[f"actor/{key}"]))
        absent = [name for name in diagnostics.NAMES if f"{diagnostics.PREFIX}{name}" not in row]
        if absent:
            yield f"no {', '.join(absent)}"


if __name__ == "__main__":
    typer.run(main)
