"""Does a masked copy of a sibling change more than it should?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import RESPONSES, mode_and_settings
from verl_m2po.staleness.config import ON_FAILED_TRAJECTORY

BEST_OF_A_GROUP = ("grpo_passk", "max_at_k")
"""Advantage estimators that look for the best of independent trajectories."""


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield an answer to failed trajectories that there is not, or that another setting rules out."""
    mode, settings = mode_and_settings(config)
    key, value = f"trainer.v1.{mode}.on_failed_trajectory", settings.on_failed_trajectory
    if value not in ON_FAILED_TRAJECTORY:
        yield Problem(key, value, "there is no such choice", f"Set it to {' or '.join(ON_FAILED_TRAJECTORY)}")
    if value != "mask":
        return
    estimator = read(config, "algorithm.adv_estimator")
    if estimator in BEST_OF_A_GROUP:
        why = (
            f"a failed trajectory becomes a masked copy of a sibling, and algorithm.adv_estimator={estimator} would "
            "take it for another attempt, as good as the best"
        )
        yield Problem(key, value, why, "Set it to refill, or take another estimator")
    if read(config, "algorithm.use_kl_in_reward"):
        why = (
            "a masked copy has no token to which algorithm.use_kl_in_reward=true could put its penalty, so the group's "
            "baseline and an adaptive coefficient would be too small"
        )
        yield Problem(key, value, why, "Set it to refill, or use actor_rollout_ref.actor.use_kl_loss")
    if RESPONSES.of(config) == 1:
        why = "with one response to a prompt (actor_rollout_ref.rollout.n=1) there is no sibling, and it is as refill"
        yield Problem(key, value, why, "Set it to refill", is_fatal=False)
