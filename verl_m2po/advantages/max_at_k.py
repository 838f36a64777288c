"""The advantage estimator `max_at_k`: the gradient of the best of k responses, unbiased on-policy.

See "The Best of N Worlds: Aligning Reinforcement Learning with Best-of-N Sampling via max@k Optimisation"
(arXiv:2510.23393).
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est

from verl_m2po.advantages.groups import group_advantages, settings_of, zero_if_equal
from verl_m2po.ground.settings import check_choice, check_whole_number

BASELINES = ("none", "leave_one_out")


@dataclass
class MaxAtKConfig:
    """Settings of `algorithm.adv_estimator=max_at_k`.

    Args:
        k: Responses of which the best counts; at most actor_rollout_ref.rollout.n. 1 is REINFORCE.
        baseline: What is subtracted from the weight of a response. leave_one_out: what the best of k is without it;
            none: nothing.
    """

    k: int = 4
    baseline: str = "leave_one_out"

    def __post_init__(self):
        check_whole_number(self.k, "algorithm.max_at_k.k", at_least=1)
        check_choice(self.baseline, BASELINES, "algorithm.max_at_k.baseline")


@register_adv_est("max_at_k")
def max_at_k_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Hashable],
    config: Any = None,
    **_ignored: Any,
) -> tuple[Tensor, Tensor]:
    """n times the weight of each response in the gradient of the expected best of k, n the size of the group.

    The factor makes k = 1 plain REINFORCE under verl's mean over responses. A group of fewer than k rows counts the
    best of all that it has (verl's padding rows are groups of their own); tokens outside the mask get 0, so a group
    without response tokens is 0 throughout.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: Prompt of each row, [batch].
        config: verl's algorithm settings; ours are `max_at_k`, see `MaxAtKConfig`.

    Returns:
        Advantages and returns, the same tensor.

    Raises:
        ValueError: k is less than 1, or the baseline is unknown.
    """
    settings = settings_of(config, "max_at_k", MaxAtKConfig)
    k, baseline = settings.k, settings.baseline

    def rule(rewards: Tensor, _group: Hashable) -> Tensor:
        best_of = min(k, len(rewards))
        weights = max_at_k_weights(rewards, best_of)
        if baseline == "leave_one_out" and best_of > 1:  # the best of one has no baseline: plain rewards
            weights = zero_if_equal(weights - leave_one_out_baseline(rewards, best_of), rewards)
        return len(rewards) * weights

    return group_advantages(token_level_rewards, response_mask, index, rule)


def max_at_k_weights(rewards: Tensor, k: int) -> Tensor:
    """For each response, the sum of max(R in S) over the k-subsets S that contain it, over the number of k-subsets.

    Args:
        rewards: Of one group, [n].
        k: Size of a subset, 1 to n.

    Returns:
        [n], same dtype. Its sum over k is the unbiased estimate of the expected best of k.
    """
    n = len(rewards)
    if not 1 <= k <= n:
        raise ValueError(f"algorithm.max_at_k.k must be between 1 and the size of a group ({n}), got {k}.")
    ascending, order = rewards.double().sort()
    # Of the subsets with the i-th smallest: it is the best of C(i, k-1); the j-th smallest is, in C(j-1, k-2), j > i.
    itself = _binomials([(i, k - 1) for i in range(n)], n, k)
    another = _binomials([(j - 1, k - 2) for j in range(n)], n, k)
    later = (another * ascending).flip(0).cumsum(0).flip(0) - another * ascending
    weights = torch.empty_like(ascending)
    weights[order] = itself.to(rewards.device) * ascending + later
    return weights.to(rewards.dtype)


def leave_one_out_baseline(rewards: Tensor, k: int) -> Tensor:
    """For each response, k / n times the mean of max(R in S) over the (k-1)-subsets S of the others; [n].

    The best of no response is 0, so k = 1 has no baseline.
    """
    n = len(rewards)
    if k == 1:
        return torch.zeros_like(rewards)
    is_other = ~torch.eye(n, dtype=torch.bool, device=rewards.device)
    best = torch.stack([max_at_k_weights(rewards[others], k - 1).sum() / (k - 1) for others in is_other])
    return k / n * best


def _binomials(pairs: list[tuple[int, int]], n: int, k: int) -> Tensor:
    """C(a, b) / C(n, k) for each pair, in exact integers up to the division; 0 where b < 0 or a < 0."""
    subsets = math.comb(n, k)
    return torch.tensor([math.comb(a, b) / subsets if min(a, b) >= 0 else 0.0 for a, b in pairs], dtype=torch.float64)
