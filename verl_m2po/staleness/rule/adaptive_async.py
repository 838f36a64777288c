"""Bounded staleness whose bound the trust region moves."""

from typing import Any

from verl_m2po.staleness.rule.adaptive import AdaptiveBound, Reason, Signal
from verl_m2po.staleness.rule.bounded import BoundedAsync


class AdaptiveAsync(BoundedAsync):
    """As `BoundedAsync`, under a bound that moves between two trainer steps.

    A lower bound holds from the next selection on: what is older now is masked, dropped or aborted as under a fixed
    bound of that size, and nothing is admitted until the queue is as short as that. A higher one admits more.

    Args:
        bound: decides; its largest is `staleness_steps`.
        of_bounded: see `BoundedAsync`.
    """

    def __init__(self, bound: AdaptiveBound, **of_bounded: Any) -> None:
        super().__init__(bound.most, **of_bounded)
        self.bound = bound
        self.bound_steps = bound.bound_steps

    def observe(self, signal: Signal) -> Reason:
        """A trainer step has shown `signal`: move the bound for those that follow."""
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
