"""``python -m verl_m2po.tasks``: make the arithmetic task, its base model, and verl's files of public data sets."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
# Progress goes to stderr, results to stdout, so that a script can take over the paths that are printed.
terminal = Console(stderr=True)


def _print_path(path: Path) -> None:
    typer.echo(path)


def _fail(error: Exception) -> typer.Exit:
    terminal.print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
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
    from verl_m2po.tasks import arithmetic as task

    try:
        with terminal.status("Writing addition problems"):
            paths = task.write_parquet(out, train_rows=rows, validation_rows=validation_rows, digits=digits, seed=seed)
    except (ValueError, OSError) as error:
        raise _fail(error) from error
    for path in paths.values():
        _print_path(path)


@app.command()
def tiny_model(
    out: Annotated[Path | None, typer.Option(help="Folder that receives a copy; the cached one without it.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Where models are kept [default: ~/.cache/verl-m2po].")] = None,
    digits: Annotated[int, typer.Option(help="Digits of the numbers that it learns to add.")] = 2,
    target_accuracy: Annotated[float, typer.Option(help="Sampled accuracy at which supervision stops.")] = 0.3,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and problems.")] = 0,
) -> None:
    """Make the tiny base model, unless the cache has it, and print its folder."""
    with terminal.status("Loading torch and transformers"):
        from transformers.utils import logging as transformers_logging

        from verl_m2po.tasks import tiny_model as model

    transformers_logging.disable_progress_bar()

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        recipe = model.Recipe(seed=seed, digits=digits, target_accuracy=target_accuracy)
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


if __name__ == "__main__":
    app(prog_name="python -m verl_m2po.tasks")
