"""Small plots of many metrics, one question each."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from matplotlib.figure import Figure

from verl_m2po.report.drawing.figures.lines import (
    NothingToDraw,
    Tasks,
    draw_line,
    legend_of,
    log_axis,
    new_figure,
    positive,
    smoothed,
    styled,
    whole_numbers,
)
from verl_m2po.report.drawing.style import looks
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, seeds_of


def _strip(groups: list[Group], panels: tuple[metrics.Panel, ...]) -> Figure:
    """Small plots, one question each; panels that nobody logged are left out."""
    shown = [panel for panel in panels if any(metrics.first_logged(group.logged, panel.metrics) for group in groups)]
    if not shown:
        raise NothingToDraw("none of " + ", ".join(panel.metrics[0] for panel in panels))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, all_axes = new_figure(3.7 * columns + 0.4, 2.5 * rows + 0.5, rows, columns)
    look = looks(groups)
    for axes in all_axes[len(shown) :]:
        axes.set_visible(False)
    for axes, panel in zip(all_axes, shown, strict=False):
        for group in groups:
            seeds = smoothed(seeds_of(group, panel.metrics))
            seeds = positive(seeds) if panel.log else seeds
            if len(seeds.mean):
                draw_line(axes, seeds, look[group.label], group.label, linewidth=1.4)
        if panel.log and axes.lines:
            log_axis(axes)
        axes.set_title(panel.title, fontsize=9.5)
        axes.tick_params(labelsize=8.5)
        axes.xaxis.set_major_locator(whole_numbers(5))
    for axes in all_axes[max(0, len(shown) - columns) : len(shown)]:
        axes.set_xlabel("trainer step", fontsize=9.5)
    legend_of(figure, *all_axes)
    return figure


@styled
def health(groups: list[Group], tasks: Tasks) -> Figure:
    """Small multiples of the metrics that move first when a run goes wrong."""
    return _strip(groups, metrics.HEALTH)


@styled
def buffer(groups: list[Group], tasks: Tasks) -> Figure:
    """Small multiples of what the staleness buffer holds, admits and evicts."""
    return _strip(groups, metrics.BUFFER)
