"""What a trainer step logged becomes the signal that moves a bound, and why it moved becomes `staleness/bound_*`."""

from collections.abc import Mapping

from verl_m2po.staleness.rule.adaptive import Reason, Signal
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.units import UpdateClock

MASKED = "actor/m2po/masked_fraction"
SECOND_MOMENT = "actor/m2po/second_moment_before"
MISMATCH_FLOOR = "actor/m2po/mismatch_floor"


class NoSignal(RuntimeError):
    """A trainer step made updates, and nothing is known of their importance ratios."""


def move_bound(
    rule: AdaptiveAsync, clock: UpdateClock, metrics: Mapping[str, float], waiting_share: float
) -> dict[str, float]:
    """The updates of a trainer step are made: move the bound of the next, and say so.

    Args:
        rule: whose bound moves.
        clock: converts trainer steps to optimizer updates.
        metrics: of the step, by verl's names; none of the actor's after a step without updates
            (`trainer.critic_warmup`), which leaves the bound where it is.
        waiting_share: of the step, in which the trainer waited for rollouts.

    Returns:
        The bound that the step's own batch was held to, and which way it moved after it.

    Raises:
        NoSignal: updates were made and their second moment is missing.
    """
    held = {"staleness/bound_updates": float(clock.updates(rule.bound_steps))}
    if not any(name.startswith("actor/") for name in metrics):
        return held | _moved(Reason.HELD, is_masking=False)
    signal = signal_of(metrics, waiting_share)
    held["staleness/bound_load"] = rule.bound.load(signal)
    return held | _moved(rule.observe(signal), rule.bound.is_masking(signal))


def signal_of(metrics: Mapping[str, float], waiting_share: float) -> Signal:
    """The signal of a trainer step that made updates.

    Raises:
        NoSignal: the actor worker does not measure it.
    """
    if missing := [name for name in (MASKED, SECOND_MOMENT) if name not in metrics]:
        raise NoSignal(
            f"the adaptive bound needs {' and '.join(missing)} of every update, which the actor worker did not give; "
            "`verl-m2po doctor` says whether it is the one of verl-m2po. Otherwise set "
            "trainer.v1.bounded_async.adaptive.enable=false"
        )
    # Unknown before the first row of age zero; taken for 0, which asks for less staleness and not for more.
    floor = metrics.get(MISMATCH_FLOOR, 0.0)
    return Signal(float(metrics[MASKED]), float(metrics[SECOND_MOMENT]) - float(floor), waiting_share)


def _moved(reason: Reason, is_masking: bool) -> dict[str, float]:
    is_lowered = reason is Reason.LOWERED
    return {
        "staleness/bound_raised": float(reason is Reason.RAISED),
        "staleness/bound_lowered_by_masking": float(is_lowered and is_masking),
        "staleness/bound_lowered_by_second_moment": float(is_lowered and not is_masking),
        "staleness/bound_at_ceiling": float(reason is Reason.AT_CEILING),
    }
