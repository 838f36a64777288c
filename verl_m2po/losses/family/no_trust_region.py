"""The loss `no_trust_region`: plain importance weighting, the paper's prosperity-before-collapse baseline."""

import math
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.family import opsm
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.surrogate import negative_aggregate
from verl_m2po.losses.kernel.token_pass import as_tokens, weigh


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
        trained = opsm.trained_tokens(log_prob, old_log_prob, advantages, response_mask, config)
        tokens = as_tokens(log_prob, old_log_prob, advantages, trained, rollout_is_weights)
        gain, keep, sums = weigh(tokens, math.inf)
        metrics = diagnostics.report(sums, keep, None)
    return negative_aggregate(log_prob, gain, gain, response_mask, loss_agg_mode, config), metrics
