"""What all figures are made of: lines with a band over seeds, axes of steps, logarithms and a legend beneath."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from functools import wraps

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from verl_m2po.report.drawing.style import RC, Look, cut, plain
from verl_m2po.report.reading.groups import Seeds

Tasks = dict[str, dict[str, str]]


class NothingToDraw(Exception):
    """No group logged what the figure shows; the message says what was looked for."""


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the settings of `style.RC`, whatever matplotlib was told before."""

    @wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


def full_label(label: str) -> str:
    """A label for a line: not cut yet, since names that are cut to the same would be one entry of the legend."""
    return plain(label, most=len(label))


def draw_line(axes: Axes, seeds: Seeds, look: Look, label: str, markers: bool = False, **style) -> None:
    """Mean over seeds, a band from the lowest to the highest seed, dotted where the shortest seed has ended."""
    marker = look.marker if markers and len(seeds.mean) <= 60 else None
    if len(seeds.mean) == 1:
        marker = look.marker  # a line of one point would draw nothing
    style = {"color": look.colour, "linestyle": look.line, "linewidth": 1.8, **style}
    axes.plot(seeds.mean.index, seeds.mean, marker=marker, markersize=3.5, label=full_label(label), **style)
    if seeds.count > 1:
        axes.fill_between(seeds.mean.index, seeds.low, seeds.high, color=look.colour, alpha=0.15, linewidth=0)
    if len(seeds.tail):
        axes.plot(seeds.tail.index, seeds.tail, color=look.colour, linestyle=(0, (1, 2)), linewidth=1.2)


def smoothed(seeds: Seeds) -> Seeds:
    """A rolling median over a twentieth of the run, for metrics that are logged at every step."""
    window = max(1, len(seeds.mean) // 20)
    if window < 3:
        return seeds

    def roll(values: pd.Series) -> pd.Series:
        return values.rolling(window, center=True, min_periods=1).median()

    return Seeds(roll(seeds.mean), roll(seeds.low), roll(seeds.high), roll(seeds.tail), seeds.count)


def _legend(figure: Figure, handles: list, labels: list[str]) -> None:
    """One legend beneath the axes, so that it never lies on data."""
    if not labels:
        return
    labels = [cut(label) for label in labels]
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 12 / (max(map(len, labels)) + 8))))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def legend_of(figure: Figure, *all_axes: Axes) -> None:
    """One legend of all these axes; a label that stands in several of them stands in it once."""
    handles: dict[str, object] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    _legend(figure, list(handles.values()), list(handles))


def whole_numbers(most: int) -> MaxNLocator:
    """At most that many places of whole numbers; one where the axis spans less than a unit, as of a single step."""
    return MaxNLocator(integer=True, nbins=most, min_n_ticks=1)


def integer_steps(axes: Axes) -> None:
    """Trainer steps on the x axis, at whole numbers."""
    axes.xaxis.set_major_locator(whole_numbers(7))
    axes.set_xlabel("trainer step")


def seeds_caption(seeds: list[Seeds]) -> str:
    """What a line and a band mean where these are drawn."""
    most = max((one.count for one in seeds), default=1)
    return "line: mean, band: lowest to highest seed" if most > 1 else "one seed each"


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def log_axis(axes: Axes) -> None:
    """A log axis with plain numbers: 1, 2 and 5 over up to two decades, then powers of ten, eight labels at most."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Between decades the locator labels nothing at all once it has to skip some.
    subs = (1.0, 2.0, 5.0) if high <= 100 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def positive(seeds: Seeds) -> Seeds:
    """What a log axis can show."""
    keep = seeds.mean > 0
    tail = seeds.tail[seeds.tail > 0]
    return Seeds(seeds.mean[keep], seeds.low[keep].clip(lower=1e-12), seeds.high[keep], tail, seeds.count)
