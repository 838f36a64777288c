"""`python -m verl_m2po.study`: run the staleness study, or go on with it, and write docs/results.md."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from verl_m2po.study import plan

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
OUT = Path("outputs/study")
PAGE = Path("docs/results.md")
# Beside the page
DATA, VERL_DATA = Path("results/one_process.json"), Path("results/verl.json")
Folder = Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are skipped.")]


def _finish(failed: list[str]) -> None:
    for line in failed:
        typer.echo(line, err=True)
    raise typer.Exit(1 if failed else 0)


@app.command()
def run(
    out: Folder = OUT,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = os.cpu_count() or 1,
    most: Annotated[int | None, typer.Option(min=1, help="Only the first of the queue; all by default.")] = None,
) -> None:
    """All runs on the experiment bench, the most telling ones first. Ctrl-C, and later on from there."""
    from verl_m2po.study.run import run_jobs

    _finish(run_jobs(plan.jobs()[:most], out / "one_process", workers, Console()))


@app.command()
def verl(
    out: Folder = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 1,
    wall_clock: Annotated[
        bool, typer.Option(help="stale_k_separate against sync, for the time to an accuracy.")
    ] = False,
) -> None:
    """The four runs that carry the claim, through verl itself, one at a time, each from its last checkpoint on."""
    from verl_m2po.study import verl_runs

    conditions = verl_runs.WALL_CLOCK if wall_clock else verl_runs.CLAIM
    _finish(verl_runs.run_verl(out / "verl", Console(), conditions, range(1, seeds + 1)))


@app.command()
def results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked sections are rewritten.")] = PAGE,
    collect: Annotated[bool, typer.Option(help="Read the runs; otherwise draw from the JSON beside the page.")] = True,
) -> None:
    """Put what has run so far into the JSON file, the page and its figures."""
    from verl_m2po.study import page as pages
    from verl_m2po.study import results as studied

    data, verl_data = page.parent / DATA, page.parent / VERL_DATA
    if collect:
        studied.write(studied.collect(plan.jobs(), out / "one_process"), data)
        if (out / "verl").is_dir():
            studied.write(studied.collect_verl(out / "verl"), verl_data)
    common, bench = studied.load(data)
    through_verl = studied.load(verl_data)[1] if verl_data.exists() else []
    pages.write(common, bench, through_verl, page)
    typer.echo(f"written: {page}, {data}")


if __name__ == "__main__":
    app()
