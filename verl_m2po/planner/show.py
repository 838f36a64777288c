"""Plans as a table, as JSON and as a picture."""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.table import Table

from verl_m2po.planner.compare import Choice, pareto
from verl_m2po.planner.setting import OFF
from verl_m2po.report.drawing.style import COLOURS, MARKERS, ON_POLICY, RC

MODE_COLOURS = {
    "sync": ON_POLICY,
    "stale_k": COLOURS["grpo"],
    "replay": COLOURS["m2po_clip"],
    "stale_k_separate": COLOURS["gspo"],
    "bounded_async": COLOURS["m2po"],
}


def as_json(choice: Choice, run_steps: int, cost_per_hour: float | None) -> dict[str, Any]:
    """One setting, with the unit in every name."""
    outcome = choice.outcome
    return {
        "mode": choice.setting.mode,
        "staleness_updates": choice.staleness_updates,
        "replay": choice.setting.replay,
        "replayed_share": outcome.replayed_share,
        "staleness_steps": choice.setting.staleness_steps,
        "devices": choice.devices,
        "generating_devices": choice.server_devices,
        "step_s_mean": outcome.mean_step_s,
        "step_s_p95": outcome.p95_step_s,
        "trainer_idle_share": outcome.trainer_idle,
        "servers_idle_share": outcome.servers_idle,
        "servers_speed_share": outcome.servers_speed,
        "age_updates_mean": choice.mean_age_updates,
        "trained_tokens_by_age_updates": {
            str(age * choice.updates_per_step): tokens for age, tokens in outcome.age_tokens.items()
        },
        "masked_tokens": outcome.masked_tokens,
        "dropped_tokens": outcome.dropped_tokens,
        "trained_tokens": outcome.trained_tokens,
        "buffer_gib_at_full_length": choice.buffer_gib,
        "tokens_per_device_hour": choice.tokens_per_device_hour,
        "run_steps": run_steps,
        "run_hours": choice.hours,
        "run_cost": None if cost_per_hour is None else choice.hours * choice.devices * cost_per_hour,
        "server_failures": outcome.server_failures,
        "restarts": outcome.restarts,
    }


def table(choices: Sequence[Choice], cost_per_hour: float | None) -> Table:
    """All settings, the fastest first; a star marks those that no other beats in both speed and age."""
    best = {id(choice) for choice in pareto(choices)}
    shown = Table(title="Simulated steady state; ages in optimizer updates")
    has_replay = any(choice.setting.is_replaying for choice in choices)
    names = ["", "mode", "staleness", "generate", "s/step", "p95", "trainer idle", "servers idle", "age"]
    names += ["wasted", "buffer GiB", "tokens/device-h", "hours", *(["cost"] if cost_per_hour is not None else [])]
    names += ["replay", "replayed"] if has_replay else []
    for name in names:
        shown.add_column(name, justify="left" if name in ("", "mode", "replay") else "right")
    for choice in sorted(choices, key=lambda each: each.outcome.mean_step_s):
        outcome = choice.outcome
        cells = [
            "*" if id(choice) in best else "",
            choice.setting.mode,
            f"{choice.staleness_updates}",
            f"{choice.server_devices}/{choice.devices}",
            f"{outcome.mean_step_s:.2f}",
            f"{outcome.p95_step_s:.2f}",
            f"{outcome.trainer_idle:.0%}",
            f"{outcome.servers_idle:.0%}",
            f"{choice.mean_age_updates:.1f}",
            f"{outcome.wasted_share:.1%}",
            f"{choice.buffer_gib:.1f}",
            f"{choice.tokens_per_device_hour:,.0f}",
            f"{choice.hours:.1f}",
        ]
        if cost_per_hour is not None:
            cells.append(f"{choice.hours * choice.devices * cost_per_hour:,.0f}")
        if has_replay:
            cells += [choice.setting.replay, f"{outcome.replayed_share:.0%}"]
        shown.add_row(*cells)
    return shown


def picture(choices: Sequence[Choice], chosen: Choice) -> Figure:
    """Speed against age: seconds of a trainer step over the mean age of a trained token."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        kinds: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for choice in choices:
            kind = choice.setting.mode, choice.setting.replay
            kinds.setdefault(kind, []).append((choice.mean_age_updates, choice.outcome.mean_step_s))
        for marker, ((mode, replay), points) in zip(cycle(MARKERS), kinds.items(), strict=False):
            label = mode if replay == OFF else f"{mode}, replay={replay}"
            axes.scatter(*zip(*points, strict=True), color=MODE_COLOURS[mode], marker=marker, label=label, alpha=0.8)
        front = [(c.mean_age_updates, c.outcome.mean_step_s) for c in pareto(choices)]
        axes.plot(*zip(*front, strict=True), color="#808080", linewidth=1, zorder=0)
        place = (chosen.mean_age_updates, chosen.outcome.mean_step_s)
        axes.scatter(*place, s=180, facecolors="none", edgecolors="black", label="recommended")
        axes.set_xlabel("mean age of a trained token (optimizer updates)")
        axes.set_ylabel("seconds per trainer step")
        axes.set_ylim(bottom=0)
        axes.set_title("Speed against age, simulated")
        axes.legend()
    return figure
