"""What a method needs of the rest of the config, as data: the preflight checks it, the families state it.

A need names one setting, what it may be, and what goes wrong otherwise. Needs that depend on other settings are small
functions of the config.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from omegaconf import DictConfig

from verl_m2po.ground.verl_config import has_proximal_policy, read

MODE = "trainer.v1.trainer_mode"
VERL_MODES = ("sync", "colocate_async", "separate_async")
ESTIMATOR = "algorithm.adv_estimator"
NORM_BY_STD = "algorithm.norm_adv_by_std_in_grpo"
BYPASS = "algorithm.rollout_correction.bypass_mode"
ROLLOUT_IS = "algorithm.rollout_correction.rollout_is"
ROLLOUT_IS_THRESHOLD = "algorithm.rollout_correction.rollout_is_threshold"
ROLLOUT_IS_NORMALIZE = "algorithm.rollout_correction.rollout_is_batch_normalize"
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs"
AGGREGATION = "actor_rollout_ref.actor.loss_agg_mode"


class Need(NamedTuple):
    """A setting that a method needs.

    Args:
        key: Full name of the setting.
        allowed: Values that it may have; the first is the one that the remedy names.
        why: What goes wrong otherwise, in one clause.
        when: Whether the need holds for a config; None: always.
    """

    key: str
    allowed: tuple[Any, ...]
    why: str
    when: Callable[[DictConfig], bool] | None = None


def needs_recorded_log_probs(config: DictConfig) -> bool:
    """Whether the behaviour policy's log-probs come from the rollout alone."""
    mode = read(config, MODE)
    if mode not in VERL_MODES:
        # The staleness modes of this package record them in any case.
        return False
    # verl's synchronous trainer recomputes old_log_probs with the very weights that generated: the behaviour policy.
    return mode != "sync" or bool(read(config, BYPASS))


def _needs_bypass(config: DictConfig) -> bool:
    if read(config, MODE) not in VERL_MODES:
        # The staleness modes of this package set it themselves, unless the config asks for a proximal policy.
        return has_proximal_policy(config)
    return needs_recorded_log_probs(config)


# The ratio is current over behaviour policy.
BEHAVIOUR = (
    Need(
        LOG_PROBS,
        (True,),
        "the ratio is taken to the behaviour policy, whose log-probs are not recorded",
        needs_recorded_log_probs,
    ),
    Need(
        BYPASS,
        (True,),
        "the ratio is taken to the behaviour policy, but old_log_probs are recomputed with the current weights, and "
        "the age of the data disappears from the ratio",
        _needs_bypass,
    ),
)
# There is a proximal policy beside the behaviour policy.
BOTH_POLICIES = (
    Need(LOG_PROBS, (True,), "the weights are proximal over behaviour policy, whose log-probs are not recorded"),
    Need(BYPASS, (False,), "there is no proximal policy beside the behaviour policy in bypass mode"),
)
