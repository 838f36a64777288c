"""The tables of docs/results.md. What stands between its markers is written here; the text around it is by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import replace_section

from staleness_study import figures
from staleness_study.figures import NAMES
from staleness_study.intervals import LEAST_SEEDS, Interval, difference, recovered_gap
from staleness_study.plan import (
    CAUSE_STALENESS,
    HALF_RATE,
    HALF_RATE_STAGE,
    STALEST,
    THRESHOLDS,
    TRIAL_LEARNING_RATES,
    VERL,
    VERL_HOT,
    WALL_CLOCK,
)
from staleness_study.results import FINAL_POINTS, SEPARATE, Result, by_accuracy, select

# Accuracies to which the time is compared; the base model has 0.33
TARGETS = (0.40, 0.42, 0.44)
# Of the claim's runs, which begin at 0.34
CLAIM_TARGET = 0.55
CAPTIONS = {
    "claim": "Accuracy, and tokens that give no gradient. Line: mean over seeds; band: lowest to highest seed.",
    "by_staleness": "Final accuracy against staleness; bars: lowest to highest seed.",
    "by_threshold": "Final accuracy against M2PO's threshold; bars: lowest to highest seed.",
    "wall_clock": "The same three runs by trainer step and by time; lines begin at the fourth validation.",
    "methods": "Final accuracy of every method on data 256 updates old; bars: lowest to highest seed.",
}


def name_of(loss: str) -> str:
    """Of a method in a table."""
    return NAMES.get(loss, f"`{loss}`")


def accuracy_of(values: Sequence[float]) -> str:
    """Mean with its interval; that of two seeds is too wide to say anything."""
    interval = Interval.of(values)
    if interval is None:
        return "-"
    return (
        f"{interval.mean:.3f}" if interval.seeds < LEAST_SEEDS else f"{interval.mean:.3f} ± {interval.half_width:.3f}"
    )


def percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.2g}%" if len(values) else "-"


def points_against(runs: Sequence[Result], unchanged: Sequence[Result]) -> str:
    """Difference to `unchanged`, in points."""
    interval = difference(runs, unchanged)
    if interval is None or runs is unchanged:
        return "-"
    width = f" ± {100 * interval.half_width:.2f}" if interval.seeds >= LEAST_SEEDS else ""
    return f"{100 * interval.mean:+.2f}{width}"


def recovered(method: Sequence[float], grpo: Sequence[float], reference: Sequence[float]) -> str | None:
    """`recovered_gap` in percent; None where it has no answer."""
    gap = recovered_gap(method, grpo, reference)
    return f"{100 * gap[0]:.0f}% [{100 * gap[1]:.0f}%, {100 * gap[2]:.0f}%]" if gap else None


def collapse(runs: Sequence[Result]) -> str:
    steps = [run.collapse_step for run in runs if run.collapse_step is not None]
    return f"{np.mean(steps):.0f} ({len(steps)}/{len(runs)})" if steps else "none"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _suffix(variant: str) -> str:
    if variant == SEPARATE:
        return ", separate devices"
    of_rate = variant.removeprefix("lr").replace("-threshold", ", threshold ")
    of_rate = re.sub(r"-steps(\d+)", r", \1 trainer steps", of_rate)
    return f", learning rate {of_rate}" if variant.startswith("lr") else ""


def conditions(results: Sequence[Result], stage: str = "staleness", target: float | None = None) -> list[str]:
    """One row for each loss, staleness and variant of a stage.

    Args:
        results: Of all stages.
        stage: Which of them; with the training score where it is kept.
        target: Also show the trainer steps to this accuracy; None: not.
    """
    rows = []
    has_scores = any(run.final_score is not None for run in results if run.stage == stage)
    for variant, age, loss in sorted({(r.variant, r.staleness_updates, r.loss) for r in results if r.stage == stage}):
        runs = select(results, stage, loss, age, variant)
        curve = runs[0].left_out_name
        scores = [accuracy_of([run.final_score for run in runs if run.final_score is not None])] if has_scores else []
        rows.append(
            [
                f"{name_of(loss)}, {'on-policy' if age == 0 else f's={age}'}{_suffix(variant)}",
                str(len(runs)),
                *scores,
                accuracy_of([run.final for run in runs]),
                accuracy_of([run.best for run in runs]),
                percent([run.mean(curve) for run in runs]),
                f"{np.mean([run.mean('second_moment') for run in runs]):.2g}",
                collapse(runs),
                *([] if target is None else [_steps_to(runs, target)]),
            ]
        )
    measured = ["score of the last 20 batches", "final accuracy"] if has_scores else ["final accuracy"]
    header = ["", "seeds", *measured, "best", "clipped or masked", "second moment before", "collapse step"]
    header += [] if target is None else [f"trainer steps to {target:.2f}"]
    return table(header, rows) if rows else ["Not run yet."]


def _steps_to(runs: Sequence[Result], target: float) -> str:
    """Trainer steps until the mean of `FINAL_POINTS` validations is there, mean over seeds if all get there."""
    steps = [step for run in runs if (step := run.first_reaching(target)) is not None]
    if len(steps) < len(runs):
        return f"{len(steps)}/{len(runs)} seeds"
    interval = Interval.of(steps)
    assert interval is not None
    return f"{interval.mean:.0f}" + (f" ± {interval.half_width:.0f}" if interval.seeds >= LEAST_SEEDS else "")


def claim(results: Sequence[Result], stage: str = "claim", variant: str = "") -> list[str]:
    """Whether the paper's claim holds here, number by number, with the paper's beside it."""
    reference = [r.final for r in select(results, stage, "grpo", 0, variant)]
    ran = sorted({r.loss for r in results if r.stage == stage})
    stale = {loss: select(results, stage, loss, STALEST, variant) for loss in dict.fromkeys([*NAMES, *ran])}
    grpo = [r.final for r in stale["grpo"]]
    rows = []
    if reference and grpo:
        lost = 100 * (np.mean(reference) - np.mean(grpo))
        rows.append([f"GRPO at s={STALEST} below on-policy", f"{lost:.1f} points", "2.6 to 10.6 points (Table 1)"])
    paper = {"m2po": "86% to 238% on its six models (Table 1)"}
    for loss, runs in stale.items():
        share = recovered([r.final for r in runs], grpo, reference)
        if share and loss != "grpo":
            rows.append([f"of that gap recovered by {name_of(loss)}", share, paper.get(loss, "-")])
    if stale["grpo"] and stale["m2po"]:
        clipped = np.mean([r.mean("clipped") for r in stale["grpo"]])
        masked = np.mean([r.mean("masked") for r in stale["m2po"]])
        ours = (
            f"{100 * clipped:.2g}% / {100 * masked:.2g}% = {clipped / masked:.0f}" if masked else f"{clipped:.2%} / 0"
        )
        rows.append(["tokens clipped by GRPO / masked by M2PO", ours, "1.22% / 0.06% = 20"])
    return table(["", "here", "the paper's"], rows)


def causes(results: Sequence[Result]) -> list[str]:
    """What M2PO recovers of GRPO's gap with one thing changed, over as many trainer steps as the claim's runs."""
    reference, grpo = ([r.final for r in select(results, "claim", "grpo", age)] for age in (0, STALEST))
    unchanged = select(results, "claim", "m2po", STALEST)
    changes = {
        "nothing": unchanged,
        "threshold 0.16 for 0.04": select(results, "causes", "m2po", STALEST, "threshold0.16"),
        "each prompt decides for itself (`scope=micro_batch`)": select(
            results, "causes", "m2po", STALEST, "micro_batch"
        ),
    }
    for age in CAUSE_STALENESS:
        changes[f"data {age} updates old" if age else "on-policy"] = select(results, "causes", "m2po", age)
    rows = []
    for change, runs in changes.items():
        if runs:
            finals = [run.final for run in runs]
            masked = percent([run.mean("masked") for run in runs])
            share = recovered(finals, grpo, reference) or "-"
            rows.append([change, str(len(runs)), accuracy_of(finals), points_against(runs, unchanged), share, masked])
    header = [
        "changed in M2PO's run at s=256",
        "seeds",
        "final accuracy",
        "points, same seeds",
        "of GRPO's gap recovered",
        "masked",
    ]
    return table(header, rows) if len(rows) > 1 else ["Not run yet."]


def methods(results: Sequence[Result]) -> list[str]:
    """One row for each method, the best first, all on the stalest data."""
    rows = []
    for loss in by_accuracy(results, "methods", {run.loss for run in results if run.stage == "methods"}):
        runs = select(results, "methods", loss, STALEST)
        left_out = [run.mean(run.left_out_name) for run in runs if run.left_out_name in run.curves]
        accuracy = accuracy_of([run.final for run in runs])
        rows.append([f"`{loss}`", str(len(runs)), accuracy, percent(left_out), collapse(runs)])
    header = ["`loss=`", "seeds", f"final accuracy, s={STALEST}", "clipped or masked", "collapse step"]
    return table(header, rows) if rows else ["Not run yet."]


def learning_rates(results: Sequence[Result]) -> list[str]:
    """What the trials of the learning rate gave."""
    rows = []
    for rate in TRIAL_LEARNING_RATES:
        for run in select(results, "learning_rate", "grpo", STALEST, f"lr{rate:g}"):
            clipped = run.mean("clipped")
            rows.append([f"{rate:g}", str(run.seed), str(run.steps[-1]), f"{100 * clipped:.2g}%", f"{run.final:.3f}"])
    if not rows:
        return ["The trials are not among the runs so far."]
    header = ["learning rate", "seed", "trainer steps", "clipped by GRPO after the ramp", "accuracy"]
    return table(header, rows)


def thresholds(results: Sequence[Result]) -> list[str]:
    """Accuracy and masked share by threshold."""
    rows = []
    for threshold in sorted((*THRESHOLDS, figures.DEFAULT_THRESHOLD)):
        variant = f"threshold{threshold:g}"
        runs = select(results, "threshold", "m2po", STALEST, variant)
        if threshold == figures.DEFAULT_THRESHOLD:
            runs = select(results, "staleness", "m2po", STALEST)
        if runs:
            masked = [run.mean("masked") for run in runs]
            rows.append([f"{threshold:g}", str(len(runs)), accuracy_of([run.final for run in runs]), percent(masked)])
    return table(["threshold", "seeds", "final accuracy", "masked"], rows) if len(rows) > 1 else ["Not run yet."]


def provenance(data: dict[str, Any], results: Sequence[Result], command: str = "make study") -> list[str]:
    """How the numbers of `command` came about."""
    steps = {run.stage: sorted({r.steps[-1] for r in results if r.stage == run.stage}) for run in results}
    lengths = ", ".join(f"{stage} {' or '.join(map(str, lengths))}" for stage, lengths in steps.items())
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    total = sum(r.seconds for r in results) / 3600
    return [
        f"`{command}`; {len(results)} runs of the experiment bench, config `{data['config']}`, trainer steps of "
        f"{results[0].updates_per_step} optimizer updates ({lengths}); {total:.1f} hours of run time in all, on "
        f"{data['machine']} shared with other work. {versions}. "
        f'"Final" is the mean of the last {FINAL_POINTS} validations (512 held-out problems, exact '
        f"probability of a right response); ± is half of a 95% interval over {LEAST_SEEDS} or more seeds (Student's "
        "t), brackets are 95% intervals of a ratio (delta method, Student's t)."
    ]


def through_verl(results: Sequence[Result], stage: str) -> list[str]:
    """The runs of a stage through verl, those that are not finished too."""
    if not results:
        return ["Not run yet."]
    steps = sorted({result.steps[-1] for result in results})
    return [
        f"Trainer steps so far: {', '.join(map(str, steps))}; {results[0].updates_per_step} updates each.",
        "",
        *conditions(results, stage),
    ]


def wall_clock(results: Sequence[Result]) -> list[str]:
    """Trainer steps and seconds to each of `TARGETS`, and how many times as fast as the run in sync that is."""
    rows = []
    reference = {run.seed: run for run in results if run.staleness_updates == 0}
    for run in sorted(results, key=lambda run: (run.staleness_updates, run.seed)):
        cells = []
        for target in TARGETS:
            step, first = run.first_reaching(target), None
            if run.seed in reference:
                first = reference[run.seed].first_reaching(target)
            if step is None:
                cells.append("not reached")
                continue
            times = "" if first is None else f", {reference[run.seed].seconds_at(first) / run.seconds_at(step):.2f}x"
            cells.append(f"{step} steps, {run.seconds_at(step):.0f} s{times}")
        name = f"{name_of(run.loss)}, {_mode(run)}"
        first, last = run.seconds_at(run.steps[1]), run.seconds_at(run.steps[-1])
        a_step = (last - first) / (run.steps[-1] - run.steps[1])
        rows.append([name, str(run.seed), f"{first:.0f} s", f"{a_step:.2f} s", f"{run.final:.3f}", *cells])
    header = ["", "seed", f"{results[0].steps[1]} steps" if results else "", "each after them", "final accuracy"]
    header += [f"to {target:.2f}" for target in TARGETS]
    return table(header, rows) if rows else ["Not run yet."]


def _mode(run: Result) -> str:
    return f"`stale_k_separate`, s={run.staleness_updates}" if run.variant == SEPARATE else "`sync`"


def write(
    data: dict[str, Any], results: Sequence[Result], verl: Mapping[str, Sequence[Result]], page: Path
) -> list[str]:
    """Bring the marked sections of `page`, and the figures beside it, up to date; names of the figures.

    Args:
        data: What the runs on the bench have in common.
        results: Of these.
        verl: Of the runs through verl, by stage: `VERL`, `VERL_HOT` and `WALL_CLOCK`.
        page: A Markdown file with all the markers.
    """
    timed = verl.get(WALL_CLOCK, ())
    drawn = figures.save([*results, *timed], page.parent / "figures" / "results")
    shown = {name: f"![{CAPTIONS[name]}](figures/results/{name}.svg)\n\n*{CAPTIONS[name]}*\n" for name in drawn}
    sections = {
        "provenance": provenance(data, results),
        "claim": [*claim(results), "", *conditions(results, "claim", CLAIM_TARGET)],
        "half rate": [*claim(results, HALF_RATE_STAGE, f"lr{HALF_RATE:g}"), "", *conditions(results, HALF_RATE_STAGE)],
        "conditions": conditions(results),
        "hot": conditions(results, "hot"),
        "methods": methods(results),
        "learning rates": learning_rates(results),
        "thresholds": thresholds(results),
        "causes": causes(results),
        "through verl": through_verl(verl.get(VERL, ()), VERL),
        "through verl, hot": through_verl(verl.get(VERL_HOT, ()), VERL_HOT),
        "wall clock": wall_clock(timed),
        "claim figure": [shown[name] for name in drawn if name == "claim"],
        "methods figure": [shown[name] for name in drawn if name == "methods"],
        "wall clock figure": [shown[name] for name in drawn if name == "wall_clock"],
        "other figures": [shown[name] for name in drawn if name.startswith("by_")],
    }
    for name, lines in sections.items():
        replace_section(page, name, "\n".join(lines))
    return drawn
