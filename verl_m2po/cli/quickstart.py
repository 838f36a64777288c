"""``verl-m2po quickstart``: data, base model, training through verl's own entry point, table and picture.

It only prepares and watches: the training is one `python -m verl.trainer.main_ppo` command, which it prints so that the
user can take it over.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from verl_m2po.ground import logs
from verl_m2po.ground.overrides import override
from verl_m2po.tasks import arithmetic, tiny_model

ACCURACY = "val-core/arithmetic/acc/mean@1"
TRAINING_ROWS, VALIDATION_ROWS = 8192, 256
_POLL_S = 0.5
_TAIL_LINES = 40


@dataclass(frozen=True)
class Run:
    """One quickstart run and where its files are.

    Args:
        out: Folder of everything that the run writes.
        steps: Trainer steps.
        loss: Option of the Hydra group ``loss``.
        seed: Seed of the order of the prompts and of the rollouts.
        overrides: Further Hydra overrides, appended as they are.
    """

    out: Path
    steps: int
    loss: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the run, which is also verl's experiment name."""
        return f"{self.loss}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of this run's logs."""
        return self.out / self.name

    @property
    def metrics(self) -> Path:
        """verl's JSON-lines log."""
        return self.folder / "attempt-1.jsonl"

    @property
    def environment(self) -> dict[str, str]:
        """Where verl's loggers write; they read it from the environment only."""
        return {"VERL_FILE_LOGGER_PATH": str(self.metrics), "TENSORBOARD_DIR": str(self.folder / "tensorboard")}

    def command(self, model: Path, data: Path) -> list[str]:
        """The command that trains."""
        return [
            sys.executable,
            "-m",
            "verl.trainer.main_ppo",
            "--config-name=arithmetic",
            "hardware=cpu",
            f"loss={self.loss}",
            override("actor_rollout_ref.model.path", model),
            override("data.train_files", data / "train.parquet"),
            override("data.val_files", data / "validation.parquet"),
            f"data.seed={self.seed}",
            f"actor_rollout_ref.rollout.seed={self.seed}",
            f"trainer.total_training_steps={self.steps}",
            override("trainer.experiment_name", self.name),
            override("hydra.run.dir", self.folder / "hydra"),
            *self.overrides,
        ]


def prepare(run: Run, console: Console) -> tuple[Path, Path]:
    """Write the data and build the base model, both cached; return their folders (model, data)."""
    data = run.out / "data"
    arithmetic.write_parquet(data, train_rows=TRAINING_ROWS, validation_rows=VALIDATION_ROWS)
    recipe = tiny_model.Recipe()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("base model")

        def show(step: int, accuracy: float) -> None:
            progress.update(task, description=f"base model: step {step}, accuracy {accuracy:.2f}")

        model = tiny_model.build(recipe, on_progress=show)
    return model, data


def train(run: Run, command: Sequence[str], console: Console) -> int:
    """Run `command`, showing its progress from verl's own log; return its exit status."""
    run.folder.mkdir(parents=True, exist_ok=True)
    logs.keep_earlier(run.metrics)
    log = run.folder / "console.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **run.environment}
        )
        try:
            _watch(run, process, console)
        except BaseException:
            process.terminate()
            raise
        finally:
            status = process.wait()
    if status:
        console.print(f"training failed with exit status {status}; the end of {log}:", style="red")
        console.print("\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:]), markup=False)
    return status


def _watch(run: Run, process: subprocess.Popen, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting Ray, vLLM and the trainer (about 90 s)", total=run.steps)
        shown = 0
        while process.poll() is None:
            time.sleep(_POLL_S)
            rows = list(read_log(run.metrics))
            if len(rows) == shown:
                continue
            shown = len(rows)
            accuracy = [row["data"][ACCURACY] for row in rows if ACCURACY in row["data"]]
            described = f"accuracy {' → '.join(f'{a:.2f}' for a in (accuracy[0], accuracy[-1]))}" if accuracy else ""
            progress.update(bar, completed=rows[-1]["step"], description=f"training  {described}")


def read_log(path: Path) -> Iterator[dict]:
    """Yield the whole lines of verl's JSON-lines log; the last one may still be being written."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def printable(run: Run, command: Sequence[str]) -> str:
    """Return the command with its environment, ready to paste into a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in run.environment.items()]
    return " \\\n  ".join([*variables, shlex.join(command[:3]), *(shlex.quote(word) for word in command[3:])])


def run_quickstart(run: Run, console: Console) -> int:
    """Prepare, train and report; return the exit status of the training."""
    model, data = prepare(run, console)
    command = run.command(model.absolute(), data.absolute())
    console.print("The command that trains, which works by hand too:", style="bold")
    console.print(printable(run, command), markup=False, highlight=False, soft_wrap=True)
    status = train(run, command, console)
    if status == 0:
        _report(run, console)
    return status


def _report(run: Run, console: Console) -> None:
    from verl_m2po.report.command import write_report

    write_report(console, [run.folder], run.out / "report")
