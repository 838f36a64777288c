"""The command ``verl-m2po try``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def try_loss(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as for verl: loss=m2po staleness=s256 ...")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of everything that the run writes.")] = Path("outputs/try"),
    config_name: Annotated[str, typer.Option(help="Primary config.")] = "arithmetic_staleness",
    digits: Annotated[int, typer.Option(min=1, help="Digits of the numbers that are added.")] = 3,
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

    torch.set_num_threads(threads)
    console = Console()
    overrides = overrides or []
    try:
        setup = setups.read(overrides, config_name)
    except (setups.NotOnTheBench, HydraException, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="OVERRIDES") from error
    has_own = setups.names_own_model(overrides)
    model = Path(setup.config.actor_rollout_ref.model.path) if has_own else setups.base_model(digits)
    folder = out / setup.config.trainer.experiment_name
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
            accuracy = metrics.get(train.ACCURACY)
            progress.update(bar, completed=step)
            if accuracy is not None:
                progress.update(bar, description=f"accuracy {accuracy:.3f}")

        log = train.train(setup, model, digits, folder, show)
    from verl_m2po.report.command import write_report

    console.print(f"log: {log}", soft_wrap=True)
    write_report(console, [folder], out / "report", figures=False)
