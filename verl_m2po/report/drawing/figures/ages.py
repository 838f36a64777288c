"""How old the data was that each trainer step trained on."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from verl_m2po.report.drawing.figures.lines import (
    NothingToDraw,
    Tasks,
    integer_steps,
    new_figure,
    styled,
    whole_numbers,
)
from verl_m2po.report.drawing.style import plain
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group
from verl_m2po.report.reading.runs import Run

MOST_HEAT_MAPS = 12
# Characters over a panel half as wide as the page
LONGEST_TITLE = 42


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


@styled
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
    figure, all_axes = new_figure(7.5 if columns == 1 else 10, 3.0 * rows + 0.4, rows, columns)
    colours = LinearSegmentedColormap.from_list("age", ["#FFFFFF", "#A6CEE3", "#0072B2", "#08306B"])
    for axes in all_axes[len(found) :]:
        axes.set_visible(False)
    mesh = None
    for axes, (group, (shares, unit)) in zip(all_axes, found, strict=False):
        mesh = _heat_map(axes, shares, colours)
        axes.set_title(f"{plain(group.label, LONGEST_TITLE)}\n{_exact_from(shares)}".rstrip(), fontsize=9.5)
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
    return f"all of age {age} from step {steps[first]}"


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
    axes.yaxis.set_major_locator(whole_numbers(6))
    integer_steps(axes)
    return mesh
