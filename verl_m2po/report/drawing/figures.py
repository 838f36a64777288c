"""The figures. Each function takes groups and returns a matplotlib Figure; nothing is shown or saved here.

A function raises `NothingToDraw` when no group logged what it shows; it draws what is there otherwise.
"""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from collections.abc import Callable
from functools import wraps

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator, PercentFormatter

from verl_m2po.report.drawing.style import PHASE_COLOURS, RC, Look, cut, is_reference, looks, plain
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, Seeds, over_seeds, result_seeds, seeds_of
from verl_m2po.report.reading.runs import Run
from verl_m2po.report.reading.summary import left_out_metric, training_seconds

Tasks = dict[str, dict[str, str]]
MOST_HEAT_MAPS = 12
# Below this share of tokens the axis of the masked fraction is linear, so that 0 can be drawn.
SMALLEST_SHARE = 1e-4


class NothingToDraw(Exception):
    """No group logged what the figure shows; the message says what was looked for."""


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


def _full(label: str) -> str:
    """A label for a line: not cut yet, since names that are cut to the same would be one entry of the legend."""
    return plain(label, most=len(label))


def _line(axes: Axes, seeds: Seeds, look: Look, label: str, markers: bool = False, **style) -> None:
    """Mean over seeds, a band from the lowest to the highest seed, dotted where the shortest seed has ended."""
    marker = look.marker if markers and len(seeds.mean) <= 60 else None
    if len(seeds.mean) == 1:
        marker = look.marker  # a line of one point would draw nothing
    style = {"color": look.colour, "linestyle": look.line, "linewidth": 1.8, **style}
    axes.plot(seeds.mean.index, seeds.mean, marker=marker, markersize=3.5, label=_full(label), **style)
    if seeds.count > 1:
        axes.fill_between(seeds.mean.index, seeds.low, seeds.high, color=look.colour, alpha=0.15, linewidth=0)
    if len(seeds.tail):
        axes.plot(seeds.tail.index, seeds.tail, color=look.colour, linestyle=(0, (1, 2)), linewidth=1.2)


def _smooth(seeds: Seeds) -> Seeds:
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


def _legend_of(figure: Figure, *all_axes: Axes) -> None:
    handles: dict[str, object] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    _legend(figure, list(handles.values()), list(handles))


def _integer_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("trainer step")


def _caption(seeds: list[Seeds]) -> str:
    most = max((one.count for one in seeds), default=1)
    return "line: mean, band: lowest to highest seed" if most > 1 else "one seed each"


def _new(
    width: float, height: float, rows: int = 1, columns: int = 1, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def _task_title(task: str, names: dict[str, str]) -> str:
    kinds = sorted({name.rsplit("/", 1)[-1] for name in names.values() if name.startswith("val-core/")})
    return plain(f"{task} ({', '.join(kinds)})" if kinds else task)


def _result_figure(groups: list[Group], tasks: Tasks, of_group: Callable, x_label: str) -> Figure:
    if not tasks:
        raise NothingToDraw("no validation accuracy (val-core/<source>/acc/mean@k) and no critic/score/mean")
    look = looks(groups)
    figure, all_axes = _new(7.5, 4.3 * len(tasks) + 0.3, rows=len(tasks))
    for axes, (task, names) in zip(all_axes, tasks.items(), strict=True):
        drawn = [(group, of_group(group, names)) for group in groups]
        drawn = [(group, seeds) for group, seeds in drawn if len(seeds.mean)]
        for group, seeds in drawn:
            _line(axes, seeds, look[group.label], group.label, markers=True)
        axes.set_title(_task_title(task, names))
        axes.set_xlabel(f"{x_label}   ({_caption([seeds for _, seeds in drawn])})")
        axes.set_ylabel("accuracy" if "/acc" in task else "result")
    _legend_of(figure, *all_axes)
    return figure


@_styled
def accuracy(groups: list[Group], tasks: Tasks) -> Figure:
    """Result against the trainer step; one line a group with its seed band, one panel a task."""
    figure = _result_figure(groups, tasks, result_seeds, "trainer step")
    for axes in figure.axes:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    return figure


def _result_by_seconds(group: Group, names: dict[str, str]) -> Seeds:
    """`result_seeds` with the mean training seconds of the seeds in the place of the step."""
    seeds = result_seeds(group, names)
    clocks = [training_seconds(run) for run in group.runs if run.name in names]
    clock = over_seeds(clocks).mean.reindex(seeds.mean.index).dropna()
    kept = [_at_seconds(series, clock) for series in (seeds.mean, seeds.low, seeds.high)]
    tail = _at_seconds(seeds.tail, _clock_of_tail(clock, clocks)) if len(seeds.tail) else seeds.tail
    return Seeds(kept[0], kept[1], kept[2], tail, seeds.count)


def _at_seconds(series: pd.Series, clock: pd.Series) -> pd.Series:
    clock = clock.reindex(clock.index.intersection(series.index))
    return series.reindex(clock.index).set_axis(clock.to_numpy())


def _clock_of_tail(clock: pd.Series, clocks: list[pd.Series]) -> pd.Series:
    """Goes on from the end of `clock` by the mean seconds of the seeds that are left, so that time never runs back."""
    if not len(clock):
        return clock
    seconds = pd.concat([one for one in clocks if len(one)], axis=1).sort_index().diff().mean(axis=1)
    later = seconds[seconds.index > clock.index[-1]].cumsum() + clock.iloc[-1]
    return pd.concat([clock.iloc[-1:], later])


@_styled
def accuracy_by_time(groups: list[Group], tasks: Tasks) -> Figure:
    """Result against seconds of training, validation not counted; one line a group."""
    if not any(len(training_seconds(run)) for group in groups for run in group.runs):
        raise NothingToDraw(f"no {' or '.join(metrics.STEP_SECONDS)}")
    return _result_figure(groups, tasks, _result_by_seconds, "seconds of training")


@_styled
def left_out_fraction(groups: list[Group], tasks: Tasks) -> Figure:
    """Share of tokens without gradient against the step: masked by the trust region, or clipped."""
    look = looks(groups)
    figure, (axes,) = _new(7.5, 4.6)
    for group in groups:
        found = [(run, left_out_metric(group, run)) for run in group.runs]
        names = {name for _, name in found if name}
        if names:
            seeds = over_seeds([run.series(name) for run, name in found if name])
            verb = "masked" if names == {metrics.MASKED_FRACTION} else "clipped"
            _line(axes, _smooth(seeds), look[group.label], f"{group.label}: {verb}")
    if not axes.lines:
        raise NothingToDraw(f"no {metrics.MASKED_FRACTION} and no {metrics.CLIP_FRACTION}")
    axes.set_yscale("symlog", linthresh=SMALLEST_SHARE, linscale=0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("share of response tokens")
    axes.set_title("Tokens clipped or masked")
    _integer_steps(axes)
    _legend_of(figure, axes)
    return figure


@_styled
def second_moment(groups: list[Group], tasks: Tasks) -> Figure:
    """Mean squared log-ratio of the trust-region tokens, before (left) and after (right) the mask; log axis.

    The threshold is drawn where a config beside a log says it.
    """
    look = looks(groups)
    figure, (left, right) = _new(9.5, 4.6, columns=2, sharey=True)
    drawn: list[Group] = []
    for axes, metric in ((left, metrics.SECOND_MOMENT_BEFORE), (right, metrics.SECOND_MOMENT_AFTER)):
        for group in groups:
            seeds = _positive(_smooth(seeds_of(group, (metric,))))
            if len(seeds.mean):
                _line(axes, seeds, look[group.label], group.label)
                drawn.append(group)
    if not drawn:
        raise NothingToDraw(f"no {metrics.SECOND_MOMENT_BEFORE} and no {metrics.SECOND_MOMENT_AFTER} above 0")
    thresholds = sorted({group.threshold for group in drawn if group.threshold is not None})
    for axes, title in ((left, "Second moment before the mask"), (right, "After the mask")):
        for threshold in thresholds:
            axes.axhline(threshold, color="black", linewidth=1, linestyle="dotted", label=f"threshold {threshold:g}")
        _log_axis(axes)
        axes.set_title(title)
        _integer_steps(axes)
    left.set_ylabel(r"mean of $(\log r)^2$ (nats$^2$)")
    _legend_of(figure, left, right)
    return figure


def _log_axis(axes: Axes) -> None:
    """A log axis with plain numbers, labelled also where the data spans less than a decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _positive(seeds: Seeds) -> Seeds:
    """What a log axis can show."""
    keep = seeds.mean > 0
    tail = seeds.tail[seeds.tail > 0]
    return Seeds(seeds.mean[keep], seeds.low[keep].clip(lower=1e-12), seeds.high[keep], tail, seeds.count)


def _staleness_axis(axes: Axes, values: list[int]) -> Callable[[int], float]:
    """Label a log2 axis of staleness; 0 stands one octave left of the smallest that is not 0."""
    positive = [value for value in values if value > 0]
    zero = np.log2(min(positive)) - 1 if positive else 0.0
    place = {value: float(np.log2(value)) if value > 0 else float(zero) for value in sorted(set(values))}
    axes.set_xticks(list(place.values()), [str(value) for value in place])
    axes.set_xlabel("staleness (optimizer updates, log2 scale)")
    return lambda value: place[value]


def _result_points(group: Group, names: dict[str, str], of: Callable[[pd.Series], float]) -> np.ndarray:
    return np.array([of(run.series(names[run.name])) for run in group.runs if run.name in names])


def _staleness_line(axes: Axes, groups: list[Group], names: dict[str, str], x_of: Callable, look: Look) -> None:
    """Final (solid) and best (hollow, dashed) result of one loss; bars from the lowest to the highest seed."""
    name = groups[0].loss or groups[0].label
    for of, label, style in (
        (lambda result: result.iloc[-1], f"{name}: final", {"linestyle": "solid", "marker": "o"}),
        (
            lambda result: result.max(),
            f"{name}: best",
            {"linestyle": "dashed", "marker": "o", "markerfacecolor": "white"},
        ),
    ):
        points = [(x_of(g.staleness_updates), _result_points(g, names, of)) for g in groups]
        x = [place for place, _ in points]
        mean = [values.mean() for _, values in points]
        bars = [
            [values.mean() - values.min() for _, values in points],
            [values.max() - values.mean() for _, values in points],
        ]
        axes.errorbar(x, mean, yerr=bars, color=look.colour, capsize=3, linewidth=1.6, label=_full(label), **style)


@_styled
def accuracy_by_staleness(groups: list[Group], tasks: Tasks) -> Figure:
    """Final and best result against staleness in optimizer updates (log2), a line for each loss."""
    known = [group for group in groups if group.staleness_updates is not None]
    if not known or not tasks:
        raise NothingToDraw("no run with a result and a known staleness (config beside the log, or s256 in the name)")
    look = looks(groups)
    figure, all_axes = _new(7.0, 4.3 * len(tasks) + 0.3, rows=len(tasks))
    for axes, (task, names) in zip(all_axes, tasks.items(), strict=True):
        shown = [group for group in known if any(run.name in names for run in group.runs)]
        x_of = _staleness_axis(axes, [group.staleness_updates or 0 for group in shown])
        for loss in dict.fromkeys(group.loss or group.label for group in shown):
            same = [group for group in shown if (group.loss or group.label) == loss]
            stalest = max(same, key=lambda group: group.staleness_updates or 0)
            _staleness_line(axes, same, names, x_of, look[stalest.label])
        for group in filter(is_reference, shown):
            level = _result_points(group, names, lambda result: result.iloc[-1]).mean()
            axes.axhline(
                level, color=look[group.label].colour, linewidth=1, linestyle="dotted", label="grpo, on-policy: final"
            )
        axes.set_title(_task_title(task, names))
        axes.set_ylabel("accuracy" if "/acc" in task else "result")
    _legend_of(figure, *all_axes)
    return figure


def age_shares(group: Group) -> tuple[pd.DataFrame, str] | None:
    """Share of the trained data at each age (columns) and step (rows) for the group's first run that logged it.

    Exact where the smallest and largest age of every step are equal. Otherwise from the logged buckets of ages, else
    from the smallest and largest age, with the data of a bucket, or of a step, spread evenly over its ages. Returns
    the shares and the unit of age, or None.
    """
    for run in group.runs:
        ends = _smallest_and_largest(run)
        if ends and (ends[0] == ends[1]).all():
            return _spread_evenly(*ends[:2]), ends[2]
        buckets = _age_buckets(run)
        if buckets is not None:
            return buckets, "trainer steps"
        if ends:
            return _spread_evenly(*ends[:2]), ends[2]
    return None


def _smallest_and_largest(run: Run) -> tuple[pd.Series, pd.Series, str] | None:
    """The ages of the freshest and the oldest data of each step, and their unit."""
    versions = metrics.first_logged(
        run.logged, (metrics.WORST_AGE_VERSIONS.format("max"), metrics.AGE_VERSIONS.format("max"))
    )
    for low, high, unit in (
        (metrics.AGE_VERSIONS.format("min"), versions, "weight versions"),
        (metrics.AGE_UPDATES.format("min"), metrics.AGE_UPDATES.format("max"), "optimizer updates"),
        (metrics.AGE_UPDATES.format("mean"), metrics.AGE_UPDATES.format("max"), "optimizer updates, mean to largest"),
    ):
        if low in run.logged and high in run.logged:
            youngest, oldest = run.series(low).align(run.series(high), join="inner")
            plausible = metrics.plausible_age(youngest) & metrics.plausible_age(oldest)
            if plausible.any():
                return youngest[plausible], oldest[plausible], unit
    return None


def _age_buckets(run: Run) -> pd.DataFrame | None:
    named = {name: match for name in run.logged if (match := metrics.AGE_BUCKET.match(name))}
    found = {name: match for name, match in named.items() if int(match["end"]) <= metrics.LARGEST_AGE}
    if not found:
        return None
    ends = sorted({int(match["end"]) for match in found.values()} | {0})
    shares = run.frame[list(found)].dropna(how="all").fillna(0.0)
    largest = max(2 * ends[-1], 1) if any(match["kind"] == "over" for match in found.values()) else ends[-1]
    spread = pd.DataFrame(0.0, index=shares.index, columns=np.arange(largest + 1))
    for name, match in found.items():
        end = int(match["end"])
        # Buckets without a token are not logged, so the one before may be missing: it ends at half of this one.
        first, last = (end + 1, largest) if match["kind"] == "over" else (end // 2 + 1 if end > 1 else end, end)
        spread.loc[:, first:last] += shares[[name]].to_numpy() / (last - first + 1)
    return spread


def _spread_evenly(low: pd.Series, high: pd.Series) -> pd.DataFrame:
    first, last = np.floor(low).astype(int), np.ceil(high).astype(int)
    ages = np.arange(min(0, first.min()), last.max() + 1)
    inside = (ages >= first.to_numpy()[:, None]) & (ages <= last.to_numpy()[:, None])
    return pd.DataFrame(inside / inside.sum(axis=1, keepdims=True), index=low.index, columns=ages)


def with_ages(groups: list[Group]) -> list[tuple[Group, tuple[pd.DataFrame, str]]]:
    """The groups that logged ages, with what `age_shares` says of each."""
    return [(group, shares) for group in groups if (shares := age_shares(group)) is not None]


@_styled
def age_of_data(groups: list[Group], tasks: Tasks) -> Figure:
    """Heat map of the age of the trained data against the step, a panel for each group.

    A flat line at k is the exact mode: every batch is of one age.
    """
    found = with_ages(groups)
    if not found:
        raise NothingToDraw(f"no {metrics.AGE_UPDATES.format('mean')} and no {metrics.AGE_VERSIONS.format('mean')}")
    found = found[:MOST_HEAT_MAPS]
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, all_axes = _new(7.5 if columns == 1 else 10, 3.0 * rows + 0.4, rows, columns)
    colours = LinearSegmentedColormap.from_list("age", ["#FFFFFF", "#A6CEE3", "#0072B2", "#08306B"])
    for axes in all_axes[len(found) :]:
        axes.set_visible(False)
    mesh = None
    for axes, (group, (shares, unit)) in zip(all_axes, found, strict=False):
        mesh = _heat_map(axes, shares, colours)
        axes.set_title(plain(group.label) + _exact_from(shares))
        axes.set_ylabel(f"age ({unit})", fontsize=9)
    assert mesh is not None
    label = "share of the batch"
    figure.colorbar(
        mesh, ax=all_axes, label=label, format=PercentFormatter(1.0), fraction=0.04, shrink=max(0.3, 1 / rows)
    )
    return figure


def _exact_from(shares: pd.DataFrame) -> str:
    """Says of a panel at which single age, and from which step on, all rows are; nothing where they are not.

    A step that was not logged ends the claim: nobody knows how old its data was.
    """
    age = shares.iloc[-1].idxmax()
    exact = (shares.max(axis=1).ge(1.0) & shares.idxmax(axis=1).eq(age)).to_numpy()
    if not exact[-1]:
        return ""
    steps = shares.index.to_numpy()
    goes_on = exact[:-1] & (np.diff(steps) == 1)
    first = len(steps) - 1 - (int(np.argmin(goes_on[::-1])) if not goes_on.all() else len(goes_on))
    return f": all of age {age} from step {steps[first]}"


def _with_gaps(shares: pd.DataFrame) -> pd.DataFrame:
    """A row of NaN in each stretch of steps that was not logged, so that nothing is drawn there."""
    steps = shares.index.to_numpy()
    gaps = steps[:-1][np.diff(steps) > 1] + 1
    return shares.reindex(np.sort(np.append(steps, gaps)))


def _heat_map(axes: Axes, shares: pd.DataFrame, colours: LinearSegmentedColormap):
    shares = _with_gaps(shares)
    steps, ages = shares.index.to_numpy(), shares.columns.to_numpy()
    grid = np.zeros((int(ages.max() - ages.min()) + 1, len(steps)))
    grid[(ages - ages.min()).astype(int)] = shares.to_numpy().T
    rows = ages.min() + np.arange(len(grid) + 1) - 0.5
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    mesh = axes.pcolormesh(edges, rows, grid, cmap=colours, vmin=0, vmax=1, rasterized=True)
    # A cell of one age in hundreds is thinner than a pixel, and a line of a single step is not drawn.
    mean = shares.to_numpy() @ ages
    axes.plot(steps, mean, color="#08306B", linewidth=1.2, marker=".", markersize=2, label="mean age")
    room = max(1.0, 0.05 * (rows[-1] - rows[0]))
    axes.set_ylim(rows[0], rows[-1] + room)
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _integer_steps(axes)
    return mesh


def _strip(groups: list[Group], panels: tuple[metrics.Panel, ...]) -> Figure:
    """Small plots, one question each; panels that nobody logged are left out."""
    shown = [panel for panel in panels if any(metrics.first_logged(group.logged, panel.metrics) for group in groups)]
    if not shown:
        raise NothingToDraw("none of " + ", ".join(panel.metrics[0] for panel in panels))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, all_axes = _new(3.7 * columns + 0.4, 2.5 * rows + 0.5, rows, columns)
    look = looks(groups)
    for axes in all_axes[len(shown) :]:
        axes.set_visible(False)
    for axes, panel in zip(all_axes, shown, strict=False):
        for group in groups:
            seeds = _smooth(seeds_of(group, panel.metrics))
            seeds = _positive(seeds) if panel.log else seeds
            if len(seeds.mean):
                _line(axes, seeds, look[group.label], group.label, linewidth=1.4)
        if panel.log and axes.lines:
            _log_axis(axes)
        axes.set_title(panel.title, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axes in all_axes[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("trainer step", fontsize=9.5)
    _legend_of(figure, *all_axes)
    return figure


@_styled
def health(groups: list[Group], tasks: Tasks) -> Figure:
    """Small multiples of the metrics that move first when a run goes wrong."""
    return _strip(groups, metrics.HEALTH)


@_styled
def buffer(groups: list[Group], tasks: Tasks) -> Figure:
    """Small multiples of what the staleness buffer holds, admits and evicts."""
    return _strip(groups, metrics.BUFFER)


def phase_seconds(group: Group) -> dict[str, float] | None:
    """Mean seconds per trainer step of each phase, over steps and seeds; None where steps were not timed.

    "other" is what the phases leave of the step. Validation ("testing") comes on top of the step, as verl times it.
    """
    totals: dict[str, list[float]] = {}
    for run in group.runs:
        name = metrics.first_logged(run.logged, metrics.STEP_SECONDS)
        if name is None:
            continue
        step = run.series(name)
        phases = {phase: run.frame[f"timing_s/{phase}"].sum() / len(step) for phase in _timed(run.logged)}
        inside = sum(seconds for phase, seconds in phases.items() if phase not in metrics.OUTSIDE_STEP)
        phases["other"] = max(0.0, float(step.mean()) - inside)
        for phase, seconds in phases.items():
            totals.setdefault(phase, []).append(float(seconds))
    return {phase: float(np.mean(values)) for phase, values in totals.items()} or None


def _timed(logged: set[str]) -> list[str]:
    return [phase for phase in (*metrics.PHASES, *metrics.OUTSIDE_STEP) if f"timing_s/{phase}" in logged]


@_styled
def time_per_step(groups: list[Group], tasks: Tasks) -> Figure:
    """Mean seconds of a trainer step, stacked by phase, a bar for each group."""
    timed = [(group, seconds) for group in groups if (seconds := phase_seconds(group)) is not None]
    if not timed:
        raise NothingToDraw(f"no {' or '.join(metrics.STEP_SECONDS)}")
    figure, (axes,) = _new(7.5, 1.6 + 0.45 * len(timed) + 0.5)
    places = np.arange(len(timed))
    left = np.zeros(len(timed))
    for phase in (*metrics.PHASES, "other", *metrics.OUTSIDE_STEP):
        width = np.array([seconds.get(phase, 0.0) for _, seconds in timed])
        if width.any():
            hatch = "///" if phase in metrics.OUTSIDE_STEP else None
            label = f"{phase} (validation, after the step)" if hatch else phase
            axes.barh(
                places, width, 0.65, left=left, color=PHASE_COLOURS[phase], hatch=hatch, edgecolor="white", label=label
            )
        left += width
    axes.set_yticks(places, [plain(group.label, 40) for group, _ in timed])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds per trainer step (mean)")
    axes.set_title("Where a step's time goes")
    _legend_of(figure, axes)
    return figure


@_styled
def throughput(groups: list[Group], tasks: Tasks) -> Figure:
    """Tokens per second and device against the step."""
    look = looks(groups)
    figure, (axes,) = _new(7.5, 4.2)
    for group in groups:
        seeds = seeds_of(group, (metrics.THROUGHPUT,))
        if len(seeds.mean):
            _line(axes, _smooth(seeds), look[group.label], group.label)
    if not axes.lines:
        raise NothingToDraw(f"no {metrics.THROUGHPUT}")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens per second and device")
    axes.set_title("Throughput (prompt and response tokens)")
    _integer_steps(axes)
    _legend_of(figure, axes)
    return figure
