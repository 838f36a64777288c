"""The advantage estimator `asymre`: asymmetric REINFORCE, which leans towards what was good.

See "Asymmetric REINFORCE for off-policy Reinforcement Learning" (arXiv:2506.20520), and `asymre` in Trinity-RFT.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from verl_m2po.advantages.groups import group_advantages, settings_of, zero_if_equal
from verl_m2po.ground.settings import check_number

KEY = "algorithm.asymre.baseline_shift"


@dataclass
class AsymREConfig:
    """Settings of `algorithm.adv_estimator=asymre`.

    Args:
        baseline_shift: Added to the group mean, in units of reward; below 0 good responses weigh more than bad ones. 0
            is the plain group mean.
    """

    baseline_shift: float = -0.1

    def __post_init__(self):
        check_number(self.baseline_shift, KEY)
        if math.isinf(self.baseline_shift):
            raise ValueError(f"{KEY} must be finite, got {self.baseline_shift}: every advantage would be infinite.")


@register_adv_est("asymre")
def asymre_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_ignored: Any,
) -> tuple[Tensor, Tensor]:
    """Reward minus (group mean + shift).

    With REINFORCE on top this equals the forward-KL regulariser of the loss `rec` with coefficient -shift.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: Prompt of each row, [batch].
        config: verl's algorithm settings; ours are `asymre`, see `AsymREConfig`.

    Returns:
        Advantages and returns, the same tensor.
    """
    shift = settings_of(config, "asymre", AsymREConfig).baseline_shift

    def rule(rewards: Tensor, _group: Hashable) -> Tensor:
        advantages = rewards - (rewards.mean() + shift)
        return advantages if shift else zero_if_equal(advantages, rewards)

    return group_advantages(token_level_rewards, response_mask, index, rule)
