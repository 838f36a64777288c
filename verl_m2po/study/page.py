"""The tables of docs/results.md. What stands between its markers is written here; the text around it is by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from verl_m2po.bench.page import replace_section
from verl_m2po.study import figures
from verl_m2po.study.figures import NAMES
from verl_m2po.study.plan import STALEST, THRESHOLDS, TRIAL_LEARNING_RATES
from verl_m2po.study.results import FINAL_POINTS, SEPARATE, Interval, Result, recovered_gap, select

CAPTIONS = {
    "claim": "Accuracy, and tokens that give no gradient. Line: mean over seeds; band: lowest to highest seed.",
    "by_staleness": "Final accuracy against staleness; bars: lowest to highest seed.",
    "by_threshold": "Final accuracy against M2PO's threshold; bars: lowest to highest seed.",
}


def _accuracy(values: Sequence[float]) -> str:
    interval = Interval.of(values)
    if interval is None:
        return "-"
    return f"{interval.mean:.3f}" if interval.seeds == 1 else f"{interval.mean:.3f} ± {interval.half_width:.3f}"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * np.mean(values):.2g}%" if len(values) else "-"


def _collapse(runs: Sequence[Result]) -> str:
    steps = [run.collapse_step for run in runs if run.collapse_step is not None]
    return f"{np.mean(steps):.0f} ({len(steps)}/{len(runs)})" if steps else "none"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def _suffix(variant: str) -> str:
    if variant == SEPARATE:
        return ", separate devices"
    return f", learning rate {variant.removeprefix('lr')}" if variant.startswith("lr") else ""


def conditions(results: Sequence[Result], stage: str = "staleness") -> list[str]:
    """One row for each loss, staleness and variant of a stage."""
    rows = []
    for variant, age, loss in sorted({(r.variant, r.staleness_updates, r.loss) for r in results if r.stage == stage}):
        runs = select(results, stage, loss, age, variant)
        curve = runs[0].left_out_name
        rows.append(
            [
                f"{NAMES.get(loss, loss)}, {'on-policy' if age == 0 else f's={age}'}{_suffix(variant)}",
                str(len(runs)),
                _accuracy([run.final for run in runs]),
                _accuracy([run.best for run in runs]),
                _percent([run.mean(curve) for run in runs]),
                f"{np.mean([run.mean('second_moment') for run in runs]):.2g}",
                _collapse(runs),
            ]
        )
    header = ["", "seeds", "final accuracy", "best", "clipped or masked", "second moment before", "collapse step"]
    return _table(header, rows) if rows else ["Not run yet."]


def claim(results: Sequence[Result]) -> list[str]:
    """Whether the paper's claim holds here, number by number, with the paper's beside it."""
    reference = [r.final for r in select(results, "claim", "grpo", 0)]
    stale = {loss: select(results, "claim", loss, STALEST) for loss in NAMES}
    grpo = [r.final for r in stale["grpo"]]
    rows = []
    if reference and grpo:
        lost = 100 * (np.mean(reference) - np.mean(grpo))
        rows.append([f"GRPO at s={STALEST} below on-policy", f"{lost:.1f} points", "2.6 to 10.6 points (Table 1)"])
    paper = {"m2po": "86% to 238% on its six models (Table 1)"}
    for loss in ("m2po", "m2po_clip", "no_trust_region", "gspo"):
        if gap := recovered_gap([r.final for r in stale[loss]], grpo, reference):
            share = f"{100 * gap[0]:.0f}% [{100 * gap[1]:.0f}%, {100 * gap[2]:.0f}%]"
            rows.append([f"of that gap recovered by {NAMES[loss]}", share, paper.get(loss, "-")])
    if stale["grpo"] and stale["m2po"]:
        clipped = np.mean([r.mean("clipped") for r in stale["grpo"]])
        masked = np.mean([r.mean("masked") for r in stale["m2po"]])
        ours = (
            f"{100 * clipped:.2g}% / {100 * masked:.2g}% = {clipped / masked:.0f}" if masked else f"{clipped:.2%} / 0"
        )
        rows.append(["tokens clipped by GRPO / masked by M2PO", ours, "1.22% / 0.06% = 20"])
    return _table(["", "here", "the paper's"], rows)


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
    return _table(header, rows)


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
            rows.append([f"{threshold:g}", str(len(runs)), _accuracy([run.final for run in runs]), _percent(masked)])
    return _table(["threshold", "seeds", "final accuracy", "masked"], rows) if len(rows) > 1 else ["Not run yet."]


def provenance(data: dict[str, Any], results: Sequence[Result]) -> list[str]:
    """How the numbers came about."""
    lengths = ", ".join(f"{stage} {steps}" for stage, steps in {r.stage: r.steps[-1] for r in results}.items())
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    total = sum(r.seconds for r in results) / 3600
    return [
        f"`make study`; {len(results)} runs of the experiment bench, config `{data['config']}`, trainer steps of "
        f"{results[0].updates_per_step} optimizer updates ({lengths}); {total:.1f} hours of run time in all, on "
        f"{data['machine']} shared with other work. {versions}. "
        f'"Final" is the mean of the last {FINAL_POINTS} validations (512 held-out problems, exact '
        "probability of a right response); ± is half of a 95% interval over seeds (Student's t), brackets are 95% "
        "bootstrap intervals over seeds."
    ]


def through_verl(results: Sequence[Result]) -> list[str]:
    """The runs through verl, those that are not finished too."""
    if not results:
        return ["Not run yet."]
    rows = conditions(results, "verl")
    steps = sorted({result.steps[-1] for result in results})
    return [
        f"Trainer steps so far: {', '.join(map(str, steps))}; {results[0].updates_per_step} updates each.",
        "",
        *rows,
    ]


def write(data: dict[str, Any], results: Sequence[Result], verl: Sequence[Result], page: Path) -> list[str]:
    """Bring the marked sections of `page`, and the figures beside it, up to date; names of the figures.

    Args:
        data: What the runs of the bench have in common.
        results: Of the bench.
        verl: Of the runs through verl.
        page: A Markdown file with all the markers.
    """
    drawn = figures.save(results, page.parent / "figures" / "results")
    shown = {name: f"![{CAPTIONS[name]}](figures/results/{name}.svg)\n\n*{CAPTIONS[name]}*\n" for name in drawn}
    sections = {
        "provenance": provenance(data, results),
        "claim": [*claim(results), "", *conditions(results, "claim")],
        "conditions": conditions(results),
        "hot": conditions(results, "hot"),
        "learning rates": learning_rates(results),
        "thresholds": thresholds(results),
        "through verl": through_verl(verl),
        "claim figure": [shown[name] for name in drawn if name == "claim"],
        "other figures": [shown[name] for name in drawn if name != "claim"],
    }
    for name, lines in sections.items():
        replace_section(page, name, "\n".join(lines))
    return drawn
