"""Bounded staleness with a bound that moves by what the trust region shows."""

from typing import Any

from verl_m2po.staleness.rule.adaptive import AdaptiveBound, Reason, Signal
from verl_m2po.staleness.rule.bounded import BoundedAsync


class AdaptiveAsync(BoundedAsync):
    """As `BoundedAsync`, under a bound that moves between two trainer steps.

    After the bound has fallen, it holds from the next selection on: groups that are too old for it are masked, dropped
    or aborted as under a fixed bound of that size, and none is admitted until the queue is as short as the bound
    allows. After it has risen, more groups are admitted.

    Args:
        bound: decides on the bound; `bound.most` is the `staleness_steps` of this rule.
        of_bounded: further arguments of `BoundedAsync`.
    """

    def __init__(self, bound: AdaptiveBound, **of_bounded: Any) -> None:
        super().__init__(bound.most, **of_bounded)
        self.bound = bound
        self.bound_steps = bound.bound_steps

    def observe(self, signal: Signal) -> Reason:
        """A trainer step has shown `signal`: move the bound for the steps that follow."""
        reason = self.bound.observe(signal)
        self.bound_steps = self.bound.bound_steps
        return reason

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"adaptive": self.bound.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "adaptive" in state:  # otherwise the bound was fixed, at the largest
            self.bound.load_state_dict(state["adaptive"])
            self.bound_steps = self.bound.bound_steps
