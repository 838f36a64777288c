"""The command ``verl-m2po report``."""

import math
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from verl_m2po.ground.places import why_no_folder

MISSING_MATPLOTLIB = (
    'verl-m2po report draws with matplotlib, which is not installed: pip install "verl-m2po[report]", '
    "or pass --no-figures for the table alone"
)


def _need_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise typer.BadParameter(MISSING_MATPLOTLIB) from error


def _target(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"--target is {value}; it must be a finite number, such as 0.5")
    return value


def _signature(paths: list[Path]) -> tuple:
    """Changes whenever a log changes, or the config beside it."""
    from verl_m2po.report.reading.runs import find_sources
    from verl_m2po.report.reading.settings import config_file

    sources = [source for path in paths for source in find_sources(path)[0]]
    configs = [config_file(source.folder) for source in sources if source.folder]
    files = [*(file for source in sources for file in source.files), *filter(None, configs)]
    return tuple(_state(file) for file in files)


def _state(file: Path) -> tuple:
    try:
        found = file.stat()
    except OSError:  # deleted since it was found
        return (str(file),)
    return (str(file), found.st_size, found.st_mtime_ns)


def write_report(
    console: Console,
    paths: list[Path],
    out: Path,
    target: float | None = None,
    metric: str | None = None,
    final_points: int = 1,
    figures: bool = True,
    refresh_s: float | None = None,
) -> bool:
    """Read, show and write one report; False if there was no run in it."""
    from verl_m2po.report.build import build
    from verl_m2po.report.drawing.tables import markdown, terminal

    report = build(paths, target, metric, final_points)
    problems = report.problems
    places = []
    if figures:
        from verl_m2po.report.drawing.write import write

        written = write(report, out, refresh_s)
        problems, places = written.problems, [written.page, written.table]
    else:
        out.mkdir(parents=True, exist_ok=True)
        places = [out / "report.md"]
        places[0].write_text(markdown(report.summaries, target, problems), encoding="utf-8")
    if report.summaries:
        console.print(terminal(report.summaries, target))
    for problem in problems:
        console.print(Text(f"- {problem}", style="yellow"), soft_wrap=True)
    for place in places:
        console.print(Text(f"written: {place}"), soft_wrap=True)
    return bool(report.groups)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="A .jsonl log of verl's file logger, a folder with attempt-1.jsonl, attempt-2.jsonl ..., "
            "a TensorBoard folder, or a folder of such runs.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.md and the figures.")] = Path("report"),
    target: Annotated[
        float | None, typer.Option(callback=_target, help="Result whose steps and seconds to reach are shown.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Metric to take as the result instead of verl's validation accuracy.")
    ] = None,
    final_points: Annotated[int, typer.Option(min=1, help="How many last points make the final value.")] = 1,
    figures: Annotated[bool, typer.Option(help="Draw figures and the HTML page.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Again whenever a log grows, until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option(min=1.0, help="Seconds between looks at the logs with --watch.")] = 30.0,
) -> None:
    """Show what verl runs did: a table here and as Markdown, figures, and one HTML page that needs nothing else.

    Works on any verl run that logged to `file` or `tensorboard`, running, finished or dead.
    """
    if figures:
        _need_matplotlib()
    if reason := why_no_folder(out):
        raise typer.BadParameter(f"--out: {reason}")
    console = Console()
    refresh_s = interval_s if watch else None
    seen: tuple | None = None
    try:
        while True:
            current = _signature(runs)
            if current != seen:
                found = write_report(console, runs, out, target, metric, final_points, figures, refresh_s)
                if not watch:
                    raise typer.Exit(0 if found else 1)
                seen = current
            time.sleep(interval_s)
    except KeyboardInterrupt:
        console.print("stopped watching")


def dashboard(
    folder: Annotated[Path, typer.Argument(help="The run's TensorBoard folder, or any folder above it.")],
) -> None:
    """Add a curated "Custom Scalars" layout to a TensorBoard folder: result, trust region, staleness, health, speed."""
    from verl_m2po.report.drawing.dashboard import write_tensorboard_layout

    if folder.exists() and not folder.is_dir():
        raise typer.BadParameter(f"{folder} is a file; give the TensorBoard folder that holds it")
    Console().print(Text(f"written: {write_tensorboard_layout(folder)}"), soft_wrap=True)


def timeline(
    ledger: Annotated[Path, typer.Argument(help="The file that trainer.v1.<mode>.ledger_path names.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .svg, .png or .pdf.")] = Path("timeline.svg"),
    first: Annotated[int, typer.Option(help="Trainer step of the first row.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Rows, a trainer step each.", min=1, max=64)] = 8,
    title: Annotated[str, typer.Option(help="Above the picture.")] = "",
) -> None:
    """Draw when each batch was generated, by which weights, and when it was trained."""
    _need_matplotlib()
    import matplotlib as mpl

    from verl_m2po.report.drawing.style import RC
    from verl_m2po.report.drawing.timeline import timeline as draw
    from verl_m2po.report.reading.ledger import LedgerError, read_ledger

    if out.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(f"--out is {out}; its name must end in .svg, .png or .pdf")
    try:
        history = read_ledger(ledger)
        figure = draw(history, first, steps, title)
    except LedgerError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # No date and no random ids in an SVG: the same ledger gives the same file.
        with mpl.rc_context(RC):
            figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise typer.BadParameter(f"--out is {out}, which cannot be written: {error.strerror or error}") from error
    console = Console()
    if history.torn:
        skipped = f"- {ledger}: skipped {history.torn} line(s) that a crash cut off or that are no JSON"
        console.print(Text(skipped, style="yellow"), soft_wrap=True)
    console.print(Text(f"written: {out}"), soft_wrap=True)
