"""Draw the figures of a report and write everything to a folder."""

# Matplotlib wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from verl_m2po.report.build import Report
from verl_m2po.report.drawing import figures
from verl_m2po.report.drawing.page import page
from verl_m2po.report.drawing.style import RC
from verl_m2po.report.drawing.tables import markdown, rows
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.about import about
from verl_m2po.report.reading.groups import Group

KINDS = ("png", "svg")
PNG_DPI = 150


@dataclass(frozen=True)
class Plot:
    """One figure of the report.

    Args:
        name: File name without ending.
        title, caption: What the page says over and under it.
        draw: From groups and tasks to a Figure.
        needs: A group that logged none of these is named as missing; empty where `draw` or the table says so.
        leaves_out: What else is not in it, one phrase each.
    """

    name: str
    title: str
    caption: str
    draw: Callable[..., Figure]
    needs: tuple[str, ...] = ()
    leaves_out: Callable[[list[Group]], list[str]] = lambda groups: []


def _missing_panels(panels: tuple[metrics.Panel, ...], groups: list[Group]) -> list[str]:
    """One phrase for a strip of small plots: the panels that no group logged, then those that only some lack."""
    lacking = defaultdict(list)
    for panel in panels:
        names = tuple(group.label for group in groups if not metrics.first_logged(group.logged, panel.metrics))
        if names:
            lacking[names].append(" or ".join(panel.metrics))
    everyone = tuple(group.label for group in groups)
    parts = [", ".join(lacking.pop(everyone))] if everyone in lacking else []
    parts += [f"{', '.join(logged)} (of {'; '.join(names)})" for names, logged in lacking.items()]
    return [f"lacks panels that were not logged: {'; '.join(parts)}"] if parts else []


def _further_heat_maps(groups: list[Group]) -> list[str]:
    left_out = [group.label for group, _ in figures.with_ages(groups)[figures.MOST_HEAT_MAPS :]]
    return [f"shows the first {figures.MOST_HEAT_MAPS} groups only, not {'; '.join(left_out)}"] if left_out else []


AGES = tuple(pattern.format("mean") for pattern in (metrics.AGE_UPDATES, metrics.AGE_VERSIONS))
PLOTS = (
    Plot(
        "accuracy",
        "Result against step",
        "Validation accuracy; dotted where the shortest seed has ended.",
        figures.accuracy,
    ),
    Plot(
        "left_out_fraction",
        "Tokens clipped or masked",
        "Share of response tokens without gradient, as a rolling median. Linear under 0.01%.",
        figures.left_out_fraction,
        (metrics.MASKED_FRACTION, metrics.CLIP_FRACTION),
    ),
    Plot(
        "second_moment",
        "Second moment",
        "Mean squared log ratio of the trust-region tokens. After the mask it stays under the threshold.",
        figures.second_moment,
        (metrics.SECOND_MOMENT_BEFORE, metrics.SECOND_MOMENT_AFTER),
    ),
    Plot(
        "accuracy_by_staleness",
        "Result against staleness",
        "Final value (filled) and best value (hollow) of each loss; bars from the lowest to the highest seed.",
        figures.accuracy_by_staleness,
    ),
    Plot(
        "age_of_data",
        "Age of the data",
        "One run of each group. A single dark line at k: every batch is exactly of age k. Where only the smallest and "
        "largest age, or buckets of ages, are logged, the data is drawn evenly between them.",
        figures.age_of_data,
        AGES,
        _further_heat_maps,
    ),
    Plot(
        "buffer",
        "Staleness buffer",
        "Prompt groups held, waiting, admitted and evicted, and who waited for whom.",
        figures.buffer,
        leaves_out=partial(_missing_panels, metrics.BUFFER),
    ),
    Plot(
        "health",
        "Health",
        "What moves first when a run goes wrong; a rolling median over steps.",
        figures.health,
        leaves_out=partial(_missing_panels, metrics.HEALTH),
    ),
    Plot(
        "time_per_step",
        "Time per step",
        "Phases as verl times them; in an asynchronous mode generation overlaps them and is not part of the step.",
        figures.time_per_step,
        metrics.STEP_SECONDS,
    ),
    Plot(
        "accuracy_by_time",
        "Result against time",
        "Seconds of training; validation, start-up and lost attempts are not counted.",
        figures.accuracy_by_time,
    ),
    Plot(
        "throughput",
        "Throughput",
        "verl's perf/throughput, a rolling median.",
        figures.throughput,
        (metrics.THROUGHPUT,),
    ),
)


@dataclass(frozen=True)
class Written:
    """Files of a written report, and all lines about what is missing, those of the figures included."""

    page: Path
    table: Path
    figures: list[Path]
    problems: list[str]


def _replace(path: Path, data: bytes) -> None:
    """Write so that a reader never sees half a file."""
    # Its own for each process: two may write one report at once.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def _render(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    # Without a date the same logs give the same bytes.
    metadata = {"Date": None} if kind == "svg" else None
    with mpl.rc_context(RC):
        figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()


def _lacking(plot: Plot, groups: list[Group]) -> list[str]:
    names = [group.label for group in groups if not group.logged & set(plot.needs)]
    return [f"figure {plot.name} lacks {'; '.join(names)}: no {' or '.join(plot.needs)} logged"] if names else []


def _failed(plot: Plot, error: Exception) -> str:
    return f"no figure {plot.name}: drawing it failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def draw(report: Report) -> tuple[list[tuple[Plot, Figure]], list[str]]:
    """The figures that can be drawn, and a line for each that cannot or that lacks a group."""
    drawn, problems = [], []
    for plot in PLOTS:
        try:
            drawn.append((plot, plot.draw(report.groups, report.tasks)))
        except figures.NothingToDraw as nothing:
            problems.append(f"no figure {plot.name}: {nothing} in the logs")
            continue
        except Exception as error:  # whatever a log holds, it must not cost the other figures
            problems.append(_failed(plot, error))
            continue
        if plot.needs:
            problems += _lacking(plot, report.groups)
        problems += [f"figure {plot.name} {phrase}" for phrase in plot.leaves_out(report.groups)]
    return drawn, problems


def write(report: Report, out: Path, refresh_s: float | None = None) -> Written:
    """Write report.html, report.md and each figure as PNG and SVG to `out`, which is made if it is not there.

    A figure that an earlier report left there and that can no longer be drawn is removed.

    Args:
        report: From `build.build`.
        out: Folder.
        refresh_s: Seconds after which a browser reloads the page; None for never.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawn, problems = draw(report)
    problems = report.problems + problems
    paths: list[Path] = []
    in_page = []
    for plot, figure in drawn:
        try:
            rendered = {kind: _render(figure, kind) for kind in KINDS}
        except Exception as error:  # matplotlib finds some values impossible only now
            problems.append(_failed(plot, error))
            continue
        for kind, data in rendered.items():
            paths.append(out / f"{plot.name}.{kind}")
            _replace(paths[-1], data)
        in_page.append((plot.title, plot.caption, rendered["svg"]))
    for plot in PLOTS:
        for kind in KINDS:
            if out / f"{plot.name}.{kind}" not in paths:
                (out / f"{plot.name}.{kind}").unlink(missing_ok=True)
    _replace(out / "report.md", markdown(report.summaries, report.target, problems).encode())
    html = page(rows(report.summaries, report.target), about(report.groups), in_page, problems, refresh_s)
    # A name may be bytes that are no text; of these Python makes characters that cannot be written.
    _replace(out / "report.html", html.encode(errors="replace"))
    return Written(out / "report.html", out / "report.md", paths, problems)
