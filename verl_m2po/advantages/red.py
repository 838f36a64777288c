"""The advantage estimators `red_drop` and `red_weight`: shaping of off-policy data by its rewards.

See "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm" (arXiv:2509.24203), and `rec` in Trinity-RFT.
"""

import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from verl_m2po.advantages.groups import group_advantages, settings_of, zero_if_equal
from verl_m2po.ground.settings import check_number, check_whole_number


@dataclass
class REDDropConfig:
    """Settings of `algorithm.adv_estimator=red_drop`.

    Args:
        seed: Which responses are dropped follows from this and from the prompt's uid.
    """

    seed: int = 0

    def __post_init__(self):
        check_whole_number(self.seed, "algorithm.red_drop.seed", at_least=0)


@dataclass
class REDWeightConfig:
    """Settings of `algorithm.adv_estimator=red_weight`.

    Args:
        temperature: Advantages are A exp(A / temperature), in units of reward, above 0. inf is plain A.
    """

    temperature: float = 1.0

    def __post_init__(self):
        check_number(self.temperature, "algorithm.red_weight.temperature", above=0)


@register_adv_est("red_drop")
def red_drop_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_ignored: Any,
) -> tuple[Tensor, Tensor]:
    """Reward minus mean, after dropping random surplus responses below the mean until they no longer prevail.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: Prompt of each row, [batch].
        config: verl's algorithm settings; ours are `red_drop`, see `REDDropConfig`. The same batch drops the same
            responses again.

    Returns:
        Advantages and returns, the same tensor; 0 for what was dropped.
    """
    seed = settings_of(config, "red_drop", REDDropConfig).seed

    def rule(rewards: Tensor, group: Hashable) -> Tensor:
        kept = balanced_subset(rewards, zlib.crc32(f"{seed}/{group}".encode()))
        return zero_if_equal(torch.where(kept, rewards - rewards[kept].mean(), 0.0), rewards)

    return group_advantages(token_level_rewards, response_mask, index, rule)


@register_adv_est("red_weight")
def red_weight_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_ignored: Any,
) -> tuple[Tensor, Tensor]:
    """A exp(A / temperature) with A the reward minus the group mean.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: Prompt of each row, [batch].
        config: verl's algorithm settings; ours are `red_weight`, see `REDWeightConfig`.

    Returns:
        Advantages and returns, the same tensor.

    Raises:
        ValueError: The temperature is not a positive number.
    """
    temperature = settings_of(config, "red_weight", REDWeightConfig).temperature

    def rule(rewards: Tensor, _group: Hashable) -> Tensor:
        advantages = rewards - rewards.mean()
        return zero_if_equal(advantages * (advantages / temperature).exp(), rewards)

    return group_advantages(token_level_rewards, response_mask, index, rule)


def balanced_subset(rewards: Tensor, seed: int) -> Tensor:
    """bool [n]: all rewards but as many random ones below the mean as there are more of these than of the others.

    Args:
        rewards: Of one group, [n].
        seed: Of the choice.
    """
    below = (rewards < rewards.mean()).nonzero().squeeze(-1)
    above = len(rewards) - len(below)
    kept = torch.ones_like(rewards, dtype=torch.bool)
    if len(below) > above:
        order = torch.randperm(len(below), generator=torch.Generator().manual_seed(seed)).to(rewards.device)
        kept[below[order[above:]]] = False
    return kept
