"""What is chosen beside the workload: mode, staleness and replay; and the rule that the trainer mode builds of it."""

from dataclasses import dataclass

from verl_m2po.planner.workload import PlanError
from verl_m2po.staleness.build_rule import build_rule
from verl_m2po.staleness.config import (
    BoundedAsyncConfig,
    ReplayConfig,
    ReplayModeConfig,
    StaleKConfig,
    StaleKSeparateConfig,
    first_uses,
)
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateClock

SHARED, SEPARATE = ("sync", "stale_k", "replay"), ("stale_k_separate", "bounded_async")
MODES = (*SHARED, *SEPARATE)
REPLAYING = ("replay", "bounded_async")
"""Modes that may train a rollout again."""

OFF = "off"
FRESH_SHARES = {OFF: 1.0, "x2": 0.5, "x4": 0.25, "x8": 0.125, "remix": 0.625}
"""Options of the group `replay` that need no rewards, and the share of a batch that is new at least."""


@dataclass(frozen=True)
class Setting:
    """What is chosen, beside the workload.

    Args:
        mode: verl's trainer mode: `sync`, `stale_k`, `replay`, `stale_k_separate` or `bounded_async`.
        staleness_steps: in trainer steps; exact, or in `bounded_async` and `replay` the bound.
        min_usable_share: of `bounded_async`, see its configuration.
        replay: option of the group `replay`.

    Raises:
        PlanError: there is no such mode or option, or the mode has none of the kind.
    """

    mode: str
    staleness_steps: int = 0
    min_usable_share: float = 0.25
    replay: str = OFF

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise PlanError(f"--modes {self.mode}: there is no such mode to simulate; there are {', '.join(MODES)}")
        if self.staleness_steps < 0 or (self.mode == "sync" and self.staleness_steps):
            raise PlanError(f"{self.mode} with a staleness of {self.staleness_steps} trainer steps: it cannot be")
        if self.replay not in FRESH_SHARES:
            known = ", ".join(name for name in FRESH_SHARES if name != OFF)
            raise PlanError(f"--replay {self.replay}: there is no such option to simulate; there are {known}")
        if self.is_replaying and self.mode not in REPLAYING:
            raise PlanError(f"--replay {self.replay}: {self.mode} trains each rollout once")

    @property
    def is_shared(self) -> bool:
        """Whether trainer and rollout take turns on the same devices."""
        return self.mode in SHARED

    @property
    def is_replaying(self) -> bool:
        """Whether a rollout may be trained again."""
        return self.replay != OFF

    @property
    def replay_config(self) -> ReplayConfig:
        """The settings that the option stands for."""
        return ReplayConfig(max_uses=None if self.is_replaying else 1, fresh_share=FRESH_SHARES[self.replay])

    def rule(self, groups: int, seed: int) -> StalenessRule:
        """The rule, built as for a run; one update a step, so that updates and trainer steps are the same.

        Args:
            groups: prompts of a trainer step.
            seed: of what is chosen to be trained again.

        Raises:
            PlanError: the new prompts of a batch would be no whole number.
        """
        share = FRESH_SHARES[self.replay]
        if first_uses(share, groups) is None:
            raise PlanError(
                f"--replay {self.replay}: at least {share:g} of a batch is new, which is no whole number of the "
                f"{groups} prompts of --batch-size"
            )
        return build_rule(self._config(), UpdateClock(groups, groups), seed)

    def _config(self) -> StaleKConfig:
        steps = self.staleness_steps
        match self.mode:
            case "bounded_async":
                bound = {"staleness_updates": steps, "min_usable_share": self.min_usable_share}
                return BoundedAsyncConfig(**bound, replay=self.replay_config)
            case "replay":
                return ReplayModeConfig(staleness_updates=steps, replay=self.replay_config)
            case "stale_k_separate":
                return StaleKSeparateConfig(staleness_updates=steps)
        return StaleKConfig(staleness_updates=steps)
