"""The command ``verl-m2po try``."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from verl_m2po.ground.places import why_no_folder

if TYPE_CHECKING:
    from verl_m2po.one_process.setup import Setup

NAME = "trainer.experiment_name="
# In the default name already, or no setting of what is learnt
NOT_IN_NAME = (NAME, "loss=", "staleness=", "trainer.total_training_steps=")
# File systems take 255 bytes.
LONGEST_NAME = 160


def _folder_name(experiment: str, overrides: list[str]) -> str:
    """`experiment`, and unless the user chose it, what else distinguishes the run: the overrides with short keys."""
    if any(override.startswith(NAME) for override in overrides):
        return experiment
    settings = [override.lstrip("+~") for override in overrides if not override.startswith(NOT_IN_NAME)]
    # Two parts of the key, by which data.seed and rollout.seed differ.
    short = [
        ".".join(key.split(".")[-2:]) + equals + value for key, equals, value in (s.partition("=") for s in settings)
    ]
    name = "-".join([experiment, *(re.sub(r"[^\w.=+-]+", "_", setting) for setting in short)])
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _model(setup: "Setup", has_own: bool, digits: int | None) -> Path:
    """The folder or hub id of the model to start from; one of ours is made where it is not there.

    Raises:
        typer.BadParameter: It is not there, or none can be made for so many digits.
    """
    from verl_m2po.launch.checks import model
    from verl_m2po.one_process.setup import base_model

    if has_own:
        for problem in model.exists(setup.config):
            raise typer.BadParameter(str(problem), param_hint="OVERRIDES")
        return Path(setup.config.actor_rollout_ref.model.path).expanduser()
    try:
        return base_model(setup.recipe, digits)
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error), param_hint="--digits") from error


def try_loss(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as for verl: loss=m2po staleness=s256 ...")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of everything that the run writes.")] = Path("outputs/try"),
    config_name: Annotated[str, typer.Option(help="Primary config.")] = "arithmetic_staleness",
    digits: Annotated[
        int | None, typer.Option(min=1, help="Digits of the numbers that are added; the config's without it.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch; the model is too small for many.")] = 1,
) -> None:
    """Try a loss on stale data in one process, without Ray: an experiment bench, not a trainer.

    Real losses, trust region, advantages and staleness rule; transformers generates. Takes the overrides of a run
    through verl, such as `loss=m2po staleness=s256 trainer.total_training_steps=300 data.seed=2`.
    """
    import torch
    from hydra.errors import HydraException

    from verl_m2po.one_process import setup as setups
    from verl_m2po.one_process import train
    from verl_m2po.one_process.claim import FolderInUse

    if reason := why_no_folder(out):
        raise typer.BadParameter(reason, param_hint="--out")
    torch.set_num_threads(threads)
    console = Console()
    overrides = overrides or []
    try:
        setup = setups.read(overrides, config_name)
    except setups.Refused as refused:
        raise SystemExit(f"verl-m2po refuses this run:\n{refused}") from None
    except (setups.NotOnTheBench, HydraException, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="OVERRIDES") from error
    model = _model(setup, setups.names_own_model(overrides), digits)
    digits = setup.recipe.digits if digits is None else digits
    options = [f"digits={digits}"] if digits != setup.recipe.digits else []
    folder = out / _folder_name(setup.config.trainer.experiment_name, [*overrides, *options])
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("generating the first batches", total=setup.steps)

        def show(step: int, metrics: dict[str, float]) -> None:
            accuracy = metrics.get(setup.task.accuracy)
            progress.update(bar, completed=step)
            if accuracy is not None:
                progress.update(bar, description=f"accuracy {accuracy:.3f}")

        try:
            log = train.train(setup, model, digits, folder, show)
        except FolderInUse as error:
            raise typer.BadParameter(str(error), param_hint="OVERRIDES") from error
    from verl_m2po.report.command import write_report

    console.print(f"log: {log}", soft_wrap=True)
    write_report(console, [folder], out / "report", figures=False)
