"""The tables of docs/replay.md: what a rollout that is trained several times is worth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import replace_section

from staleness_study import page, replay_figures
from staleness_study.figures import NAMES
from staleness_study.intervals import LEAST_SEEDS, Interval, difference
from staleness_study.replay_plan import CORE, EPOCHS, EPOCHS_NAME, METHODS, USES, WINDOWS, Condition, steps_shown
from staleness_study.results import FINAL_POINTS, PROMPTS, Result

SECTION, CLOCK_SECTION = "replay results", "replay wall clock"
REFERENCE = CORE[0]
# Of the timed runs
CLOCK_SHOWN = {
    "on_policy": "sync",
    "bounded_async": "bounded_async",
    "bounded_async x4": "bounded_async replay=x4",
}
CLOCK_NAMES = tuple(CLOCK_SHOWN)
# (how a rollout is used again, window in optimizer updates)
ROWS = (("", 0), (EPOCHS_NAME, 0), *((reuse, window) for window in WINDOWS for reuse in USES))


def of_condition(results: Sequence[Result], condition: Condition) -> list[Result]:
    """The seeds of one condition of the stage, whole."""
    return [run for run in results if (run.loss, run.variant, run.staleness_updates) == condition]


def compared(results: Sequence[Result], condition: Condition) -> list[Result]:
    """The seeds of one condition of the stage, each up to the updates after which all are compared."""
    return [run.until(steps_shown(condition)) for run in of_condition(results, condition)]


def accuracy_after(run: Result, prompts: float) -> float | None:
    """Mean of the validations up to the one after which `prompts` were generated, `FINAL_POINTS` at most.

    None where not as many were generated, or none was validated by then.
    """
    by_then = [
        accuracy for accuracy, made in zip(run.accuracy[1:], run.curves[PROMPTS], strict=True) if made <= prompts
    ]
    is_long_enough = run.curves[PROMPTS][-1] >= prompts
    return float(np.mean(by_then[-FINAL_POINTS:])) if by_then and is_long_enough else None


def _values(values: Sequence[float], digits: int = 3) -> str:
    interval = Interval.of(values)
    if interval is None:
        return "-"
    width = f" ± {interval.half_width:.{digits}f}" if interval.seeds >= LEAST_SEEDS else ""
    return f"{interval.mean:.{digits}f}{width}"


def _name(condition: Condition) -> str:
    loss, reuse, window = condition
    name = page.name_of(loss)
    if reuse == EPOCHS_NAME:
        return f"{name}, on-policy, {EPOCHS} epochs on each batch"
    return f"{name}, {USES[reuse]} uses, window {window} updates" if reuse else f"{name}, on-policy, one use"


def _row_name(reuse: str, window: int) -> str:
    return _name(("", reuse, window)).partition(", ")[2]


def table(results: Sequence[Result]) -> list[str]:
    """Final accuracy of each method: a row for each way to use a rollout, a column for each method."""
    header = ["", "prompts generated", "seeds", *map(page.name_of, METHODS), "on-policy GRPO after as many prompts"]
    rows = []
    reference = of_condition(results, REFERENCE)
    for reuse, window in ROWS:
        by_method = [compared(results, (loss, reuse, window)) for loss in METHODS]
        ran = [run for runs in by_method for run in runs]
        if not ran:
            continue
        prompts = ran[0].curves[PROMPTS][-1]
        after = [accuracy for run in reference if (accuracy := accuracy_after(run, prompts)) is not None]
        seeds = "/".join(dict.fromkeys(str(len(runs)) for runs in by_method))
        finals = [_values([run.final for run in runs]) for runs in by_method]
        rows.append([_row_name(reuse, window), f"{prompts:,.0f}", seeds, *finals, _values(after)])
    return page.table(header, rows)


def against_m2po(results: Sequence[Result]) -> list[str]:
    """Points by which each other method is above M2PO, on the same seeds; rows and columns as in `table`."""
    others = [loss for loss in METHODS if loss != "m2po"]
    rows = []
    for reuse, window in ROWS:
        own = compared(results, ("m2po", reuse, window))
        found = [page.points_against(compared(results, (loss, reuse, window)), own) for loss in others]
        if any(points != "-" for points in found):
            rows.append([_row_name(reuse, window), *found])
    return page.table(["points against M2PO", *map(page.name_of, others)], rows) if rows else []


def comparisons(results: Sequence[Result]) -> list[str]:
    """M2PO at four uses against GRPO at four uses and on-policy training, on the same seeds, in points."""
    _, replayed, clipped = CORE
    lines = []
    for what, other in (("GRPO at four uses", clipped), ("on-policy GRPO", REFERENCE)):
        found = difference(compared(results, replayed), compared(results, other))
        if found is not None:
            width = f" ± {100 * found.half_width:.1f}" if found.seeds >= LEAST_SEEDS else ""
            seeds = f"{found.seeds} seed{'s' if found.seeds > 1 else ''}"
            lines.append(
                f"M2PO at four uses, window 256, against {what}: {100 * found.mean:+.1f}{width} points ({seeds})."
            )
    return lines


def prompts_to_match(run: Result, reference: Result) -> float | None:
    """Prompts that `run` generated until it was as good as `reference` at its end, over those of `reference`.

    None where it never was.
    """
    step = run.first_reaching(reference.final)
    if step is None:
        return None
    return run.curves[PROMPTS][run.steps.index(step) - 1] / reference.curves[PROMPTS][-1]


def shares_to_match(results: Sequence[Result]) -> list[str]:
    """A line for each loss with replay: which share of the prompts of on-policy training it took to be as good."""
    reference = {run.seed: run.until(steps_shown(REFERENCE)) for run in of_condition(results, REFERENCE)}
    lines = []
    for condition in CORE[1:]:
        runs = [run for run in of_condition(results, condition) if run.seed in reference]
        shares = [prompts_to_match(run, reference[run.seed]) for run in runs]
        known = [100 * share for share in shares if share is not None]
        if not runs:
            continue
        of_those = f", with {_values(known, 0)}% of its prompts" if known else ""
        lines.append(
            f"{_name(condition)}: as good as on-policy GRPO at its end on {len(known)} of {len(runs)} seeds{of_those} "
            f"(run until {max(run.steps[-1] for run in runs):,} trainer steps)."
        )
    return lines


def provenance(data: dict[str, Any], results: Sequence[Result]) -> str:
    """How the numbers came about."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    hours = sum(run.seconds for run in results) / 3600
    return (
        f"`python -m staleness_study replay`, then `replay-results`; {len(results)} runs of the experiment bench, "
        f"config `{data['config']}`; {hours:.1f} hours of run time, on {data['machine']} shared with other work. "
        f"{versions}. "
        f'"Final" is the mean of the last {FINAL_POINTS} validations; ± is half of a 95% interval over {LEAST_SEEDS} '
        "or more seeds (Student's t). An epoch on the same batch counts as a use."
    )


def wall_clock(results: Sequence[Result]) -> list[str]:
    """Seconds of the timed runs to each of `TARGETS`, and the share of `sync`'s time on the same seed that is."""
    rows = []
    sync = {run.seed: run for run in results if run.variant == CLOCK_NAMES[0]}
    for run in sorted(results, key=lambda run: (CLOCK_NAMES.index(run.variant), run.seed)):
        cells = [_to(target, run, sync.get(run.seed)) for target in page.TARGETS]
        first, last = run.seconds_at(run.steps[1]), run.seconds_at(run.steps[-1])
        a_step = f"{(last - first) / (run.steps[-1] - run.steps[1]):.2f} s" if len(run.steps) > 2 else "-"
        name = f"{NAMES.get(run.loss, run.loss)}, `{CLOCK_SHOWN[run.variant]}`"
        rows.append((name, str(run.seed), str(run.steps[-1]), a_step, f"{run.final:.3f}", *cells))
    if not rows:
        return ["Not run yet."]
    header = ("", "seed", "trainer steps", "each", "final accuracy", *(f"to {target:.2f}" for target in page.TARGETS))
    lines = [header, ("---", *("---:",) * (len(header) - 1)), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _to(target: float, run: Result, sync: Result | None) -> str:
    step = run.first_reaching(target, points=1)
    if step is None:
        return "not reached"
    first = None if sync is None else sync.first_reaching(target, points=1)
    share = "" if sync is None or first is None else f" ({run.seconds_at(step) / sync.seconds_at(first):.0%})"
    return f"{run.seconds_at(step):.0f} s{share}"


def write(data: dict[str, Any], results: Sequence[Result], timed: Sequence[Result], path: Path) -> None:
    """Bring the marked sections of the page up to date.

    Args:
        data: What the runs of the bench have in common.
        results: Of the bench.
        timed: Of the timed runs through verl.
        path: docs/replay.md.
    """
    shown = replay_figures.save(results, timed, path.parent / "figures" / "results")
    lines = [
        *shown,
        *table(results),
        "",
        *against_m2po(results),
        "",
        *comparisons(results),
        "",
        *shares_to_match(results),
        "",
        provenance(data, results),
    ]
    replace_section(path, SECTION, "\n".join(lines))
    replace_section(path, CLOCK_SECTION, "\n".join(wall_clock(timed)))
