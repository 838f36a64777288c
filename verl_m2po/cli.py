"""The ``verl-m2po`` command."""

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(help="Learn from stale rollouts in verl.", no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Keep `doctor` a sub-command while it is the only one."""


@app.command()
def doctor(
    ray_worker: Annotated[bool, typer.Option(help="Look inside a Ray worker too (about 20 s).")] = True,
) -> None:
    """Check that verl sees everything this package adds; exit 1 with a remedy for each thing that is wrong."""
    from verl_m2po import doctor

    if not doctor.run(Console(), ray_worker=ray_worker):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the console script."""
    app()
