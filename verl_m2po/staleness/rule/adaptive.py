"""How stale the data may be, by what the trust region shows: a bound that falls fast and rises slowly.

A signal of each trainer step goes in (masked share and second moment), and the bound comes out. The load is the larger
of the two as a share of its target. When it is above 1 for several trainer steps in a row, the bound halves. While it
is at most `Targets.quiet` and the trainer waits for rollouts, the bound rises by one trainer step, and then stays at
least until data as old as it allows have been trained on. A bound that proved too high is a ceiling. It is tried again
only once the load at the present bound has fallen so far that it would be quiet at the ceiling too: while the run does
not change, the ceiling is not tried again and again. No other system ties staleness to its trust region; the form is
that of TCP's congestion window (Chiu and Jain, 1989: additive increase, multiplicative decrease), with a memory.
"""

import math
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

LARGEST_LOAD = 1e6
"""The load where a signal is not finite. It is a finite number, so that it is equal again after a restart from JSON."""


class Reason(IntEnum):
    """What the bound did after a trainer step, as it is logged."""

    HELD = 0
    LOWERED = 1
    RAISED = 2
    AT_CEILING = 3


@dataclass(frozen=True)
class Signal:
    """What one trainer step has shown.

    Args:
        masked_share: share of the response tokens that the trust region masked.
        second_moment: mean of (log r)^2 over trust-region tokens before masking, less the mismatch floor (nats^2): the
            part that is due to staleness, and not to the inference engine.
        waiting_share: share of the step in which the trainer waited for rollouts.
    """

    masked_share: float
    second_moment: float
    waiting_share: float


@dataclass(frozen=True)
class Targets:
    """When the trust region counts as loaded, and the bound as too low.

    Args:
        masked_share: target of `Signal.masked_share`; positive.
        second_moment: target of `Signal.second_moment`; positive.
        waiting_share: up to this `Signal.waiting_share` the trainer counts as not waiting, and a larger bound would
            gain nothing.
        quiet: the load up to which the bound may rise; below 1.
        patience_steps: trainer steps in a row with a load above 1 before the bound falls; at least 1.
    """

    masked_share: float = 0.01
    second_moment: float = 0.04
    waiting_share: float = 0.02
    quiet: float = 0.5
    patience_steps: int = 2

    def __post_init__(self) -> None:
        for name in ("masked_share", "second_moment"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.quiet < 1 or self.patience_steps < 1:
            raise ValueError(f"quiet={self.quiet} must be between 0 and 1, patience_steps={self.patience_steps} >= 1")


@dataclass
class AdaptiveBound:
    """The bound in trainer steps, moved once a trainer step.

    Args:
        least: the lowest bound, in trainer steps.
        most: the highest bound, in trainer steps; the bound begins here.
        targets: the targets of the signals.

    Raises:
        ValueError: `least` is negative, or above `most`.
    """

    least: int
    most: int
    targets: Targets = field(default_factory=Targets)

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ValueError(f"the least bound, {self.least} trainer steps, must be 0 to the largest, {self.most}")
        self.bound_steps = self.most
        self._loaded = 0  # trainer steps above target, in a row
        self._since_move = 0
        self._ceiling: int | None = None
        self._load_at_ceiling = 0.0
        self._settled_load: float | None = None  # at the present bound, once data of its age were trained on

    def load(self, signal: Signal) -> float:
        """The larger signal as a share of its target; `LARGEST_LOAD` where a signal is not finite."""
        shares = self._shares(signal)
        return min(max(0.0, *shares), LARGEST_LOAD) if all(map(math.isfinite, shares)) else LARGEST_LOAD

    def is_masking(self, signal: Signal) -> bool:
        """Whether the masked share, and not the second moment, is the larger signal as a share of its target."""
        masked, moment = self._shares(signal)
        return not masked < moment

    def _shares(self, signal: Signal) -> tuple[float, float]:
        targets = self.targets
        return signal.masked_share / targets.masked_share, signal.second_moment / targets.second_moment

    def observe(self, signal: Signal) -> Reason:
        """Move the bound after a trainer step; returns why it was moved, or was not."""
        load = self.load(signal)
        self._loaded = self._loaded + 1 if load > 1 else 0
        self._since_move += 1
        if self._loaded >= self.targets.patience_steps and self.bound_steps > self.least:
            self._remember(load)
            self._move(max(self.least, self.bound_steps // 2))
            return Reason.LOWERED
        is_seen = self._since_move > self.bound_steps
        if is_seen and self._settled_load is None:
            self._settled_load = load
        wants = load <= self.targets.quiet and signal.waiting_share > self.targets.waiting_share
        if not (wants and is_seen and self.bound_steps < self.most):
            return Reason.HELD
        if self._is_below_ceiling(load):
            self._move(self.bound_steps + 1)
            return Reason.RAISED
        return Reason.AT_CEILING

    def _move(self, bound_steps: int) -> None:
        self.bound_steps, self._loaded, self._since_move, self._settled_load = bound_steps, 0, 0, None

    def _remember(self, load: float) -> None:
        self._ceiling, self._load_at_ceiling = self.bound_steps, load

    def _is_below_ceiling(self, load: float) -> bool:
        """Whether the next bound is worth trying: below the ceiling, or what is there has calmed down."""
        if self._ceiling is None or self.bound_steps + 1 < self._ceiling:
            return True
        settled = self._settled_load or 0.0
        if not settled or load * self._load_at_ceiling > self.targets.quiet * settled:
            return False
        self._ceiling = None
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to go on, as plain JSON."""
        return {
            "bound_steps": self.bound_steps,
            "loaded": self._loaded,
            "since_move": self._since_move,
            "ceiling": self._ceiling,
            "load_at_ceiling": self._load_at_ceiling,
            "settled_load": self._settled_load,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`; if `least` or `most` have changed since, from the nearest bound within them."""
        self.bound_steps = min(max(state["bound_steps"], self.least), self.most)
        self._loaded, self._since_move = state["loaded"], state["since_move"]
        self._ceiling, self._load_at_ceiling = state["ceiling"], state["load_at_ceiling"]
        self._settled_load = state["settled_load"]
