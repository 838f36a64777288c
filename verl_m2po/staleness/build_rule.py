"""The rule of a trainer mode from its settings: for a run through verl and on the experiment bench."""

from typing import Any

from verl_m2po.staleness.config import BoundedAsyncConfig, ReplayConfig, ReplayModeConfig, StaleKConfig, first_uses
from verl_m2po.staleness.rule.adaptive import AdaptiveBound, Targets
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.bounded_replay import BoundedReplay
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.imitation import Imitation
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import Reuse
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateClock, UpdateCount


def build_rule(
    settings: StaleKConfig,
    clock: UpdateClock,
    seed: int | None,
    updates: UpdateCount | None = None,
    most_in_flight: int | None = None,
) -> StalenessRule:
    """What may be started, and what is trained.

    Args:
        settings: of the mode, checked.
        clock: converts optimizer updates to trainer steps.
        seed: `data.seed`; None draws as 0 does.
        updates: counts those that each step really makes; None: what the clock says.
        most_in_flight: prompt groups that an exact mode generates at a time; None: no limit.
    """
    steps, batch_size = clock.steps(settings.staleness_updates), clock.train_batch_size
    match settings:
        case ReplayModeConfig():
            until = settings.reference.reincarnate_after_steps
            reused = _reused(settings.replay, batch_size, seed)
            return Replay(steps, batch_size, updates=updates, steps_of_reuse=until, **reused)
        case BoundedAsyncConfig() if settings.reuses:
            ahead = settings.ahead_steps(clock)
            bounded = {"min_usable_share": settings.min_usable_share, "updates": updates, "ahead_steps": ahead}
            return BoundedReplay(steps, batch_size, **bounded, **_reused(settings.replay, batch_size, seed))
        case BoundedAsyncConfig():
            return _bounded(settings, clock, updates)
    return ExactStale(steps, batch_size, most_in_flight)


def _reused(replay: ReplayConfig, batch_size: int, seed: int | None) -> dict[str, Any]:
    """How often a group is trained, and which, as arguments of a rule."""
    count = first_uses(replay.fresh_share, batch_size)
    assert count is not None, "checks/replay.py refuses other shares"
    return {
        "reuse": Reuse(replay.max_uses, count, replay.sampling, 0 if seed is None else seed),
        "imitation": Imitation(replay.baseline_groups, replay.ramp_steps),
    }


def _bounded(settings: BoundedAsyncConfig, clock: UpdateClock, updates: UpdateCount | None) -> BoundedAsync:
    """The rule of the mode `bounded_async`, with a fixed bound or one that moves."""
    shared: dict[str, Any] = {
        "batch_size": clock.train_batch_size,
        "min_usable_share": settings.min_usable_share,
        "updates": updates,
    }
    adaptive, most = settings.adaptive, clock.steps(settings.staleness_updates)
    if not adaptive.enable:
        return BoundedAsync(most, **shared)
    targets = Targets(
        masked_share=adaptive.target_masked_fraction,
        second_moment=adaptive.target_second_moment,
        waiting_share=adaptive.waiting_share,
        quiet=adaptive.quiet_share,
        patience_steps=adaptive.patience_steps,
    )
    return AdaptiveAsync(AdaptiveBound(clock.steps(adaptive.min_staleness_updates), most, targets), **shared)
