"""The advantage estimator `oapl`: reward minus the soft value of the prompt, for the loss `oapl`.

See OAPL (arXiv:2602.19362), Eq. 2.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from verl_m2po.advantages.groups import group_advantages, settings_of, zero_if_equal
from verl_m2po.ground.settings import check_number


@dataclass
class OAPLAdvantageConfig:
    """Settings of `algorithm.adv_estimator=oapl`.

    Args:
        beta1: Temperature of the soft value of a prompt, in units of reward, above 0. inf is the group mean; towards 0
            it is the largest reward of the group.
    """

    beta1: float = 1.0

    def __post_init__(self):
        check_number(self.beta1, "algorithm.oapl.beta1", above=0)


@register_adv_est("oapl")
def oapl_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_ignored: Any,
) -> tuple[Tensor, Tensor]:
    """R - V with V = beta1 log mean exp(R / beta1) over the responses to a prompt.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: Prompt of each row, [batch].
        config: verl's algorithm settings; ours are `oapl`, see `OAPLAdvantageConfig`.

    Returns:
        Advantages and returns, the same tensor.

    Raises:
        ValueError: beta1 is not a positive number.
    """
    beta1 = settings_of(config, "oapl", OAPLAdvantageConfig).beta1

    def rule(rewards: Tensor, _group: Hashable) -> Tensor:
        return zero_if_equal(rewards - soft_value(rewards, beta1), rewards)

    return group_advantages(token_level_rewards, response_mask, index, rule)


def soft_value(rewards: Tensor, beta1: float) -> Tensor:
    """beta1 log mean exp(R / beta1), a scalar."""
    if math.isinf(beta1):
        return rewards.mean()
    return beta1 * (torch.logsumexp(rewards / beta1, 0) - math.log(len(rewards)))
