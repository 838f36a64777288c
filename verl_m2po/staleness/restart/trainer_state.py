"""What the trainer's process knows besides its buffer, for a checkpoint."""

from collections.abc import Mapping
from typing import Any

from verl_m2po.staleness.rule.informative import InformativeWindow
from verl_m2po.staleness.rule.units import UpdateCount


class TrainerState:
    """The updates of each step, which prompts taught something, and the coefficient of the KL in the reward.

    Args:
        trainer: verl's, which makes its controller of the KL in the reward (`kl_ctrl_in_reward`) later, if at all.
        updates: made in each trainer step.
        informative: what ends a run whose prompts teach it too little; None where nothing does.
    """

    def __init__(self, trainer: Any, updates: UpdateCount, informative: InformativeWindow | None) -> None:
        self._trainer, self._updates, self._informative = trainer, updates, informative

    @property
    def _kl_controller(self) -> Any | None:
        return getattr(self._trainer, "kl_ctrl_in_reward", None)

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        state: dict[str, Any] = {"updates": self._updates.state_dict()}
        if self._informative is not None:
            state["informative"] = self._informative.state_dict()
        if (controller := self._kl_controller) is not None:
            state["kl_coefficient"] = controller.value
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, which an earlier version may have written without some of it."""
        self._updates.load_state_dict(state.get("updates", []))
        if self._informative is not None:
            self._informative.load_state_dict(state.get("informative", []))
        if "kl_coefficient" in state and (controller := self._kl_controller) is not None:
            controller.value = state["kl_coefficient"]
