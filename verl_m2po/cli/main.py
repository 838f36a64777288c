"""The ``verl-m2po`` command."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from verl_m2po.cli import plan as plan_command
from verl_m2po.one_process import command as one_process_command
from verl_m2po.report import command as report_command

app = typer.Typer(help="Learn from stale rollouts in verl.", no_args_is_help=True, pretty_exceptions_enable=False)


app.command()(report_command.report)
app.command()(report_command.dashboard)
app.command()(report_command.timeline)
app.command()(plan_command.plan)
app.command(name="try")(one_process_command.try_loss)


@app.command()
def doctor(
    ray_worker: Annotated[bool, typer.Option(help="Look inside a Ray worker too (about 20 s).")] = True,
) -> None:
    """Check that verl sees everything this package adds; exit 1 with a remedy for each thing that is wrong."""
    from verl_m2po.cli import doctor

    if not doctor.run(Console(), ray_worker=ray_worker):
        raise typer.Exit(1)


@app.command()
def quickstart(
    overrides: Annotated[list[str] | None, typer.Argument(help="Further Hydra overrides.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Trainer steps.")] = 80,
    out: Annotated[Path, typer.Option(help="Folder of everything that the run writes.")] = Path("outputs/quickstart"),
    loss: Annotated[str, typer.Option(help="Option of the Hydra group loss: m2po, grpo, no_trust_region ...")] = "m2po",
    seed: Annotated[int, typer.Option(help="Seed of the order of prompts and of the rollouts.")] = 1,
) -> None:
    """Train a tiny model to add, through verl's own entry point, without a GPU."""
    from verl_m2po.cli.quickstart import Run, run_quickstart

    run = Run(out=out.absolute(), steps=steps, loss=loss, seed=seed, overrides=tuple(overrides or ()))
    raise typer.Exit(run_quickstart(run, Console()))


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A path may have bytes that are no text: what is told of the work must not end it.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    app()
