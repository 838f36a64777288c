"""``python -m verl_m2po.tasks``: make our tasks, their base models, and verl's files of public data sets."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from verl_m2po.tasks.sets import DATA_SETS, DataSet

if TYPE_CHECKING:
    from verl_m2po.tasks.prepare import Prepared

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
# Progress goes to stderr, results to stdout, so that a script can take over the paths that are printed.
terminal = Console(stderr=True)
# Unusable rows shown on the terminal; the file beside the data has all of them.
LISTED_ROWS = 20
SET_NAMES = ", ".join(DATA_SETS)


def _print_path(path: Path) -> None:
    typer.echo(path)


def _fail(error: Exception) -> typer.Exit:
    terminal.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    return typer.Exit(code=1)


@app.command()
def arithmetic(
    out: Annotated[Path, typer.Option(help="Folder for train.parquet and validation.parquet.")],
    rows: Annotated[int, typer.Option(help="Rows to train on.")] = 8192,
    validation_rows: Annotated[int, typer.Option(help="Rows to validate on.")] = 512,
    digits: Annotated[int, typer.Option(help="Digits of each number.")] = 2,
    seed: Annotated[int, typer.Option(help="Row i depends on this and on i alone.")] = 0,
) -> None:
    """Write multi-digit addition as parquet files for verl."""
    _write("arithmetic", out, rows, validation_rows, digits, seed)


@app.command()
def column_addition(
    out: Annotated[Path, typer.Option(help="Folder for train.parquet and validation.parquet.")],
    rows: Annotated[int, typer.Option(help="Rows to train on.")] = 8192,
    validation_rows: Annotated[int, typer.Option(help="Rows to validate on.")] = 512,
    digits: Annotated[int, typer.Option(help="Digits of the longest numbers; the shortest have half as many.")] = 40,
    seed: Annotated[int, typer.Option(help="Row i depends on this and on i alone.")] = 0,
) -> None:
    """Write addition column by column, with responses of 60 to 120 tokens, as parquet files for verl."""
    _write("column_addition", out, rows, validation_rows, digits, seed)


def _write(task: str, out: Path, rows: int, validation_rows: int, digits: int, seed: int) -> None:
    from verl_m2po.tasks.made import TASKS

    try:
        with terminal.status("Writing addition problems"):
            paths = TASKS[task].write_parquet(
                out, train_rows=rows, validation_rows=validation_rows, digits=digits, seed=seed
            )
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    for path in paths.values():
        _print_path(path)


@app.command()
def tiny_model(
    out: Annotated[Path | None, typer.Option(help="Folder that receives a copy; the cached one without it.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models are kept [default: ~/.cache/verl-m2po].")] = None,
    task: Annotated[str, typer.Option(help="What it learns: arithmetic or column_addition.")] = "arithmetic",
    digits: Annotated[int | None, typer.Option(help="Digits of the numbers that it learns to add.")] = None,
    target_accuracy: Annotated[
        float | None, typer.Option(help="Sampled accuracy at which supervision stops; 0.3 or so without it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and problems.")] = 0,
) -> None:
    """Make the tiny base model, unless the cache has it, and print its folder."""
    with terminal.status("Loading torch and transformers"):
        from transformers.utils import logging as transformers_logging

        from verl_m2po.tasks import tiny_model as model

    transformers_logging.disable_progress_bar()

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        changed = {"digits": digits, "target_accuracy": target_accuracy}
        recipe = model.recipe_of(task, seed=seed, **{key: value for key, value in changed.items() if value is not None})
        with Progress(*columns, console=terminal) as progress:
            bar = progress.add_task("Base model", total=recipe.target_accuracy)

            def show(step: int, accuracy: float) -> None:
                completed = min(accuracy, recipe.target_accuracy)
                description = f"Base model: step {step}, accuracy {accuracy:.2f} of {recipe.target_accuracy}"
                progress.update(bar, completed=completed, description=description)

            folder = model.build(recipe, cache=cache, out=out, on_progress=show)
            progress.update(bar, completed=recipe.target_accuracy)
    except (ValueError, OSError, RuntimeError) as error:
        raise _fail(error) from error
    _print_path(folder)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help=f"One of {SET_NAMES}.")],
    out: Annotated[Path, typer.Option(help="Folder for <split>.parquet.")],
    source: Annotated[Path | None, typer.Option(help="Local file, or folder of files; the hub without it.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail if a row cannot be used.")] = False,
) -> None:
    """Write a public data set as parquet files for verl, with the rows that verl's scorers can judge."""
    from verl_m2po.tasks import prepare as preparation

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        data_set = preparation.find(name)
        with Progress(*columns, console=terminal) as progress:
            bar = progress.add_task(f"Loading {data_set.title}", total=None)

            def show(split: str, done: int, total: int) -> None:
                progress.update(bar, description=f"Checking {data_set.title} {split}", completed=done, total=total)

            splits = preparation.prepare(name, out, source=source, on_row=show)
    except (ValueError, OSError, RuntimeError) as error:
        raise _fail(error) from error
    terminal.print(_table_of_splits(data_set, splits))
    for split in splits:
        _list_unusable(split)
        if split.path:
            _print_path(split.path)
    if strict and any(split.unusable for split in splits):
        raise _fail(ValueError(f"rows of {data_set.title} cannot be used, and --strict was given"))
    if any(split.path is None for split in splits):
        raise _fail(ValueError(f"no row of {data_set.title} can be used in one of its splits"))


def _table_of_splits(data_set: DataSet, splits: "list[Prepared]") -> Table:
    table = Table(title=f"{data_set.title}, scored as {data_set.data_source}")
    table.add_column("split")
    table.add_column("rows", justify="right")
    table.add_column("unusable", justify="right")
    table.add_column("file", overflow="fold")
    for split in splits:
        table.add_row(split.split, str(split.rows), str(len(split.unusable)), str(split.path or "-"))
    return table


def _list_unusable(split: "Prepared") -> None:
    if not split.unusable:
        return
    table = Table(title=f"Rows of {split.split} that cannot be used")
    for header in ("row", "reason", "question"):
        table.add_column(header, overflow="fold")
    for row in split.unusable[:LISTED_ROWS]:
        table.add_row(str(row.index), escape(row.reason), escape(textwrap.shorten(row.question, 60)))
    terminal.print(table)
    more = len(split.unusable) - LISTED_ROWS
    terminal.print(f"{f'{more} more. ' if more > 0 else ''}All of them: {split.unusable_path}", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m verl_m2po.tasks")
