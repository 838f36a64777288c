"""The rule of a trainer mode from its settings: for a run through verl and on the experiment bench."""

from typing import Any

from verl_m2po.staleness.config import BoundedAsyncConfig, ReplayModeConfig, StaleKConfig, make_replay
from verl_m2po.staleness.rule.adaptive import AdaptiveBound, Targets
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.exact import ExactStale
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
        seed: `data.seed`.
        updates: counts those that each step really makes; None: what the clock says.
        most_in_flight: prompt groups that an exact mode generates at a time; None: no limit.
    """
    steps, batch_size = clock.steps(settings.staleness_updates), clock.train_batch_size
    match settings:
        case ReplayModeConfig():
            return make_replay(settings, steps, batch_size, seed, updates)
        case BoundedAsyncConfig():
            return _bounded(settings, clock, updates)
    return ExactStale(steps, batch_size, most_in_flight)


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
