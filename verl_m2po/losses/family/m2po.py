"""The loss `m2po`: Algorithm 1 of M2PO (arXiv:2510.01161)."""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.config import KEY, M2POConfig
from verl_m2po.losses.family import opsm
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import decision_of
from verl_m2po.losses.kernel.settings import settings_of
from verl_m2po.losses.kernel.surrogate import negative_aggregate
from verl_m2po.losses.kernel.token_pass import add_tokens, as_tokens, weigh
from verl_m2po.second_moment import TrustRegionSearch


@register_policy_loss("m2po")
def m2po_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """-A r on the tokens that Algorithm 1 of M2PO keeps, over all response tokens; nothing is clipped.

    Args:
        old_log_prob: log-probs under the behaviour policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape. All of it is in the denominator, kept or not.
        loss_agg_mode: verl's name of the aggregation; the paper's is "token-mean".
        config: verl's actor settings; `policy_loss.m2po` holds ours.
        rollout_is_weights: verl's rollout correction weights, multiplied onto each token; None: 1.

    Returns:
        The loss, and metrics where no actor worker of ours collects them.

    Raises:
        RuntimeError: scope=mini_batch, but nobody decided over the mini-batch.
        ValueError: Arguments do not fit each other.
    """
    assert config is not None, "config must be verl's ActorConfig."
    settings = settings_of(config, "m2po", M2POConfig)
    with torch.no_grad():
        trained = opsm.trained_tokens(log_prob, old_log_prob, advantages, response_mask, config)
        tokens = as_tokens(log_prob, old_log_prob, advantages, trained, rollout_is_weights)
        region = decision_of(
            f"{KEY}.m2po.scope", settings.scope, lambda: add_tokens(TrustRegionSearch(settings.threshold), tokens)
        )
        gain, keep, sums = weigh(tokens, region.threshold_log_ratio)
        metrics = diagnostics.report(sums, keep, region)
    return negative_aggregate(log_prob, gain, gain, response_mask, loss_agg_mode, config), metrics
