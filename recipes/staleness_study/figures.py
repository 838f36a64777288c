"""The figures of docs/results.md, from the results alone."""

# Matplotlib annotates wider types than it takes, and wants its own type for the keys of rcParams.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from staleness_study.plan import AGED, STALEST, THRESHOLDS, WALL_CLOCK
from staleness_study.results import FINAL_POINTS, SEPARATE, Result, by_accuracy, select
from verl_m2po.report.drawing.style import COLOURS, LINES, ON_POLICY, OTHERS, RC

NAMES = {
    "m2po": "M2PO",
    "m2po_clip": "M2PO, authors' clip",
    "grpo": "GRPO",
    "no_trust_region": "no trust region",
    "gspo": "GSPO",
}
NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}
DEFAULT_THRESHOLD = 0.04


def _curves(results: Sequence[Result], curve: str | None = None) -> tuple[list[int], np.ndarray]:
    """Steps, and one row of values for each seed: accuracies, or one of the other curves."""
    if curve is None:
        return results[0].steps, np.array([result.accuracy for result in results])
    return results[0].steps[1:], np.array([result.curves[curve] for result in results])


def band(axes: Axes, results: Sequence[Result], colour: str, curve: str | None = None, **style) -> float:
    """Mean over seeds and a band from the lowest to the highest; returns where the line ends."""
    steps, values = _curves(results, curve)
    axes.plot(steps, values.mean(0), color=colour, linewidth=2, **style)
    if len(values) > 1:
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    return float(values.mean(0)[-1])


def _apart(ends: dict[str, float], least: float) -> dict[str, float]:
    """Heights for labels at the ends of lines, in their order and `least` apart."""
    placed: dict[str, float] = {}
    last = -np.inf
    for name in sorted(ends, key=ends.__getitem__):
        last = placed[name] = max(ends[name], last + least)
    shift = float(np.mean([placed[name] - ends[name] for name in ends])) if ends else 0.0
    return {name: height - shift for name, height in placed.items()}


def label_ends(axes: Axes, at: int, ends: dict[str, float], colours: dict[str, str], least: float) -> None:
    for name, height in _apart(ends, least).items():
        axes.annotate(
            name, (at, height), xytext=(6, 0), textcoords="offset points", color=colours[name], va="center", fontsize=10
        )


def claim(results: Sequence[Result]) -> Figure | None:
    """What staleness does and what M2PO does about it: accuracy, and the tokens that each method leaves out.

    None before any of its runs is finished.
    """
    if not any(run.stage == "claim" for run in results):
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        _accuracy(left, results)
        _left_out(right, results)
        return figure


def _accuracy(axes: Axes, results: Sequence[Result]) -> None:
    ends, colours = {}, {}
    lines = [("on-policy (GRPO, s=0)", select(results, "claim", "grpo", 0), ON_POLICY)]
    lines += [
        (NAMES[loss], select(results, "claim", loss, STALEST), COLOURS[loss])
        for loss in ("m2po", "no_trust_region", "grpo")
    ]
    for name, runs, colour in lines:
        if runs:
            style = {"linestyle": (0, (4, 1.5)), "zorder": 3} if colour == ON_POLICY else {}
            ends[name], colours[name] = band(axes, runs, colour, **style), colour
    last = max(run.steps[-1] for _, runs, _ in lines for run in runs)
    axes.set_xlim(0, last)
    updates = next(run.updates_per_step for _, runs, _ in lines for run in runs)
    axes.axvspan(0, STALEST / updates, color="#F4F4F4", zorder=0)
    axes.annotate(
        "data of the\nbase model",
        (STALEST / updates, axes.get_ylim()[0]),
        xytext=(4, 6),
        textcoords="offset points",
        fontsize=8,
        color="#7A7A7A",
    )
    low, high = axes.get_ylim()
    label_ends(axes, last, ends, colours, 0.052 * (high - low))
    axes.set_xlabel(f"trainer step ({NUMBERS.get(updates, updates)} optimizer updates)")
    axes.set_ylabel("accuracy on held-out problems")
    axes.set_title(f"Accuracy on data {STALEST} updates old")


def _left_out(axes: Axes, results: Sequence[Result]) -> None:
    """In the lines' own words: GRPO clips, M2PO masks; without a trust region nothing is left out."""
    for loss, verb, is_above in (("grpo", "GRPO clips", True), ("m2po", "M2PO masks", False)):
        runs = select(results, "claim", loss, STALEST)
        if not runs:
            continue
        curve = runs[0].left_out_name
        band(axes, runs, COLOURS[loss], curve)
        axes.set_xlim(0, runs[0].steps[-1])
        share = np.mean([run.mean(curve) for run in runs])
        steps, values = _curves(runs, curve)
        middle = len(steps) // 2
        beside = values[:, middle - 2 : middle + 3]
        axes.annotate(
            f"{verb} {100 * share:.2g}%",
            (steps[middle], beside.max() if is_above else beside.min()),
            xytext=(0, 5 if is_above else -5),
            textcoords="offset points",
            color=COLOURS[loss],
            fontsize=10,
            ha="center",
            va="bottom" if is_above else "top",
        )
    axes.set_yscale("symlog", linthresh=1e-4, linscale=0.4)
    axes.set_ylim(0, 3 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("trainer step")
    axes.set_ylabel("share of response tokens")
    axes.set_title("Tokens that give no gradient")


def _bars(axes: Axes, x: Sequence[float], finals: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Means over seeds, with bars from the lowest to the highest."""
    means = [float(np.mean(values)) for values in finals]
    down = [mean - min(values) for mean, values in zip(means, finals, strict=True)]
    up = [max(values) - mean for mean, values in zip(means, finals, strict=True)]
    axes.errorbar(x, means, yerr=[down, up], color=colour, marker="o", capsize=3, linewidth=1.8, label=label)


def by_staleness(results: Sequence[Result]) -> Figure | None:
    """Final accuracy against staleness for each of `AGED`; None without an age between on-policy and the stalest."""
    ages = sorted({r.staleness_updates for r in results if r.stage == "staleness"})
    if len(ages) < 3:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(6.5, 4.2), layout="constrained")
        axes = figure.subplots()
        reference = [r.final for r in select(results, "staleness", "grpo", 0)]
        if reference:
            axes.axhline(np.mean(reference), color=ON_POLICY, linestyle=(0, (4, 1.5)), label="on-policy (GRPO)")
        for i, loss in enumerate(AGED):
            found = [(age, [r.final for r in select(results, "staleness", loss, age)]) for age in ages if age > 0]
            points = [(age, values) for age, values in found if values]
            if points:
                # Side by side, so that no bar hides another.
                x = [np.log2(age) + 0.05 * (i - 1.5) for age, _ in points]
                colour = COLOURS.get(loss, OTHERS[0])
                _bars(axes, x, [values for _, values in points], colour, NAMES.get(loss, loss))
        stale = [age for age in ages if age > 0]
        axes.set_xticks([np.log2(age) for age in stale], [str(age) for age in stale])
        axes.set_xlabel("staleness (optimizer updates, log scale)")
        axes.set_ylabel("final accuracy")
        axes.set_title("Accuracy against staleness")
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def by_threshold(results: Sequence[Result]) -> Figure | None:
    """Final accuracy against M2PO's threshold; None where the sweep has not run."""
    points = []
    for threshold in sorted((*THRESHOLDS, DEFAULT_THRESHOLD)):
        is_default = threshold == DEFAULT_THRESHOLD
        runs = (
            select(results, "staleness", "m2po", STALEST)
            if is_default
            else select(results, "threshold", "m2po", STALEST, f"threshold{threshold:g}")
        )
        if runs:
            points.append((threshold, [run.final for run in runs]))
    if len(points) < 3:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(6, 3.8), layout="constrained")
        axes = figure.subplots()
        x = [np.log2(threshold) for threshold, _ in points]
        _bars(axes, x, [values for _, values in points], COLOURS["m2po"], "M2PO")
        for loss in ("grpo", "no_trust_region"):
            level = [r.final for r in select(results, "staleness", loss, STALEST)]
            if level:
                axes.axhline(np.mean(level), color=COLOURS[loss], linestyle="dashed", label=NAMES[loss])
        axes.set_xticks(x, [f"{threshold:g}" for threshold, _ in points])
        axes.set_xlabel("threshold (log scale)")
        axes.set_ylabel("final accuracy")
        axes.set_title(f"M2PO's threshold, data {STALEST} updates old")
        figure.legend(loc="outside lower center", ncols=3)
        return figure


def methods(results: Sequence[Result]) -> Figure | None:
    """What every method has on the stalest data; None before any has run.

    What ends below the base model stands at the edge with its number.
    """
    ran = [run for run in results if run.stage == "methods"]
    losses = by_accuracy(ran, "methods", {run.loss for run in ran})[::-1]
    if not losses:
        return None
    base = float(np.mean([run.accuracy[0] for run in ran]))
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7, 1.2 + 0.22 * len(losses)), layout="constrained")
        axes = figure.subplots()
        for height, loss in enumerate(losses):
            finals = [run.final for run in select(ran, "methods", loss, STALEST)]
            colour = COLOURS.get(loss, OTHERS[1])
            if (mean := float(np.mean(finals))) < base:
                at = f"\N{LEFTWARDS ARROW} {mean:.2f}"
                style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "color": colour}
                axes.annotate(at, (base, height), (4, 0), **style)
            else:
                seeds_in_a_row(axes, height, finals, colour, colour)
        axes.set_yticks(range(len(losses)), losses)
        axes.set_ylim(-0.7, len(losses) - 0.3)
        axes.set_xlim(left=base)
        for label, loss in zip(axes.get_yticklabels(), losses, strict=True):
            label.set_color(COLOURS.get(loss, OTHERS[1]))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("final accuracy (left edge: the base model's)")
        axes.set_title(f"Every method on data {STALEST} updates old")
        return figure


def seeds_in_a_row(axes: Axes, height: float, finals: Sequence[float], colour: str, fill: str) -> None:
    """The mean, with a bar from the lowest to the highest seed; nothing for no seed."""
    if finals:
        axes.plot([min(finals), max(finals)], [height, height], color=colour, linewidth=1.6)
        axes.plot(float(np.mean(finals)), height, "o", color=colour, markerfacecolor=fill, markersize=5.5)


def wall_clock(results: Sequence[Result]) -> Figure | None:
    """Accuracy against time, on separate devices and in sync; None where the runs through verl are not there."""
    runs = [run for run in results if run.stage == WALL_CLOCK]
    if not runs:
        return None
    with mpl.rc_context(RC):
        figure = Figure(figsize=(6.5, 3.8), layout="constrained")
        axes = figure.subplots()
        for run, line in zip(sorted(runs, key=lambda run: run.staleness_updates), cycle(LINES)):
            means = run.series.rolling(FINAL_POINTS).mean().dropna()
            colour = COLOURS[run.loss] if run.variant == SEPARATE else ON_POLICY
            name = f"{NAMES[run.loss]}, s={run.staleness_updates}" if run.variant == SEPARATE else "on-policy, sync"
            minutes = [run.seconds_at(step) / 60 for step in means.index]
            axes.plot(minutes, means, color=colour, linestyle=line, linewidth=2, label=name)
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes of training, validation not counted")
        axes.set_ylabel(f"accuracy, mean of {FINAL_POINTS} validations")
        axes.set_title("Generation beside training on old data, and one after the other")
        figure.legend(loc="outside lower center", ncols=3)
        return figure


FIGURES = {
    "claim": claim,
    "by_staleness": by_staleness,
    "by_threshold": by_threshold,
    "methods": methods,
    "wall_clock": wall_clock,
}


def save(results: Sequence[Result], folder: Path) -> list[str]:
    """Draw what can be drawn as SVG into `folder`; names of the figures that are there now."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.svg"
        figure = draw(results)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        with mpl.rc_context(RC):
            figure.savefig(path, metadata={"Date": None})
        drawn.append(name)
    return drawn
