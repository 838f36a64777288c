"""`python -m verl_m2po.study`: run the staleness study, or go on with it."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from verl_m2po.study import plan

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
OUT = Path("outputs/study")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are skipped.")] = OUT,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = os.cpu_count() or 1,
    most: Annotated[int | None, typer.Option(min=1, help="Start at most that many; all of them by default.")] = None,
) -> None:
    """All runs on the bench, the most telling ones first."""
    from verl_m2po.study.run import run_jobs

    failed = run_jobs(plan.jobs()[:most], out, workers, Console())
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    app()
