"""The loss `no_trust_region`: plain importance weighting, the paper's prosperity-before-collapse baseline."""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses import diagnostics, opsm
from verl_m2po.losses.surrogate import LOG_RATIO_LIMIT, aggregate, detached_log_ratio, negative_weighted_advantage
from verl_m2po.second_moment import check_tokens, trust_region_magnitude


@register_policy_loss("no_trust_region")
def no_trust_region_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """-A r on every response token, as `m2po` with an infinite threshold; arguments as there.

    See "Prosperity before Collapse" (arXiv:2510.01161): without a trust region stale data first learns as fast as
    fresh data, then collapses. Tokens with non-finite log ratio are left out.
    """
    assert config is not None, "config must be verl's ActorConfig."
    with torch.no_grad():
        log_ratio = detached_log_ratio(log_prob, old_log_prob)
        advantages = advantages.to(log_ratio.dtype)
        check_tokens(log_ratio, advantages, response_mask)
        size = log_ratio.abs()
        keep = (size < torch.inf).logical_and_(response_mask)
        keep = opsm.restrict(keep, log_ratio, advantages, response_mask, config)
        weighted = negative_weighted_advantage(log_ratio, advantages, keep, rollout_is_weights)
        derivative = weighted.masked_fill(size > LOG_RATIO_LIMIT, 0.0)
        magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
        metrics = diagnostics.report(log_ratio, magnitude, response_mask, keep, weighted, None)
    return aggregate(log_prob, weighted, derivative, response_mask, loss_agg_mode, config), metrics
