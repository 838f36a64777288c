"""What the trust region leaves out, and the second moment that it bounds."""

# Pandas and matplotlib annotate wider types than they return.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from verl_m2po.report.drawing.figures.lines import (
    NothingToDraw,
    Tasks,
    draw_line,
    integer_steps,
    legend_of,
    log_axis,
    new_figure,
    positive,
    smoothed,
    styled,
)
from verl_m2po.report.drawing.style import looks
from verl_m2po.report.reading import metrics
from verl_m2po.report.reading.groups import Group, over_seeds, seeds_of
from verl_m2po.report.reading.summary import left_out_metric

# Below this share of tokens the axis of the masked fraction is linear, so that 0 can be drawn.
SMALLEST_SHARE = 1e-4


@styled
def left_out_fraction(groups: list[Group], tasks: Tasks) -> Figure:
    """Share of tokens without gradient against the step: masked by the trust region, or clipped."""
    look = looks(groups)
    figure, (axes,) = new_figure(7.5, 4.6)
    for group in groups:
        found = [(run, left_out_metric(group, run)) for run in group.runs]
        names = {name for _, name in found if name}
        if names:
            seeds = over_seeds([run.series(name) for run, name in found if name])
            verb = "masked" if names == {metrics.MASKED_FRACTION} else "clipped"
            draw_line(axes, smoothed(seeds), look[group.label], f"{group.label}: {verb}")
    if not axes.lines:
        raise NothingToDraw(f"no {metrics.MASKED_FRACTION} and no {metrics.CLIP_FRACTION}")
    axes.set_yscale("symlog", linthresh=SMALLEST_SHARE, linscale=0.5)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("share of response tokens")
    axes.set_title("Tokens clipped or masked")
    integer_steps(axes)
    legend_of(figure, axes)
    return figure


@styled
def second_moment(groups: list[Group], tasks: Tasks) -> Figure:
    """Mean squared log-ratio of the trust-region tokens, before (left) and after (right) the mask; log axis.

    The threshold is drawn where a config beside a log says it.
    """
    look = looks(groups)
    figure, (left, right) = new_figure(9.5, 4.6, columns=2, sharey=True)
    drawn: list[Group] = []
    for axes, metric in ((left, metrics.SECOND_MOMENT_BEFORE), (right, metrics.SECOND_MOMENT_AFTER)):
        for group in groups:
            seeds = positive(smoothed(seeds_of(group, (metric,))))
            if len(seeds.mean):
                draw_line(axes, seeds, look[group.label], group.label)
                drawn.append(group)
    if not drawn:
        raise NothingToDraw(f"no {metrics.SECOND_MOMENT_BEFORE} and no {metrics.SECOND_MOMENT_AFTER} above 0")
    thresholds = sorted({group.threshold for group in drawn if group.threshold is not None})
    for axes, title in ((left, "Second moment before the mask"), (right, "After the mask")):
        for threshold in thresholds:
            axes.axhline(threshold, color="black", linewidth=1, linestyle="dotted", label=f"threshold {threshold:g}")
        log_axis(axes)
        axes.set_title(title)
        integer_steps(axes)
    left.set_ylabel(r"mean of $(\log r)^2$ (nats$^2$)")
    legend_of(figure, left, right)
    return figure
