"""The loss `m2po_clip`: the form that the authors of M2PO released, which clips where the paper masks.

Written anew from the description of https://github.com/Infini-AI-Lab/M2PO. It bounds the second moment that remains
after clipping, so it takes the gradient from a superset of the tokens that Algorithm 1 drops.
"""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses import diagnostics, opsm
from verl_m2po.losses.config import M2POClipConfig
from verl_m2po.losses.surrogate import LOG_RATIO_LIMIT, aggregate, detached_log_ratio, importance_ratio
from verl_m2po.second_moment import TrustRegion, check_tokens, trust_region_magnitude


@register_policy_loss("m2po_clip")
def m2po_clip_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """max(-A r, -A clip(r, exp(-tau), exp(tau))) with tau from the second moment of this micro-batch.

    As in the released code each micro-batch decides for itself, the bounds have no floors (its `miniclip` is off in
    every released script) and there is no dual clip. Unlike there, the sign of A is taken token by token, no rounding
    slack is subtracted from tau, and tau = 0 is a value like any other. Arguments as for `m2po_loss`; the setting is
    `policy_loss.m2po_clip.threshold`.
    """
    assert config is not None, "config must be verl's ActorConfig."
    settings = config.policy_loss.get("m2po_clip", None) or M2POClipConfig()
    with torch.no_grad():
        log_ratio = detached_log_ratio(log_prob, old_log_prob)
        advantages = advantages.to(log_ratio.dtype)
        check_tokens(log_ratio, advantages, response_mask)
        magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
        tau = clip_bound(magnitude, settings.threshold)
        finite = torch.isfinite(log_ratio) & response_mask
        finite = opsm.restrict(finite, log_ratio, advantages, response_mask, config)
        clipped = magnitude > tau
        bounded = torch.where(clipped, tau * torch.sign(advantages), log_ratio)
        value = importance_ratio(bounded).mul_(advantages).neg_()
        if rollout_is_weights is not None:
            value.mul_(rollout_is_weights)
        value.masked_fill_(~finite, 0.0)
        derivative = value.masked_fill(clipped | (log_ratio.abs() > LOG_RATIO_LIMIT), 0.0)
        region = TrustRegion(tau, tau, tau)
        metrics = diagnostics.report(log_ratio, magnitude, response_mask, finite & ~clipped, derivative, region)
    return aggregate(log_prob, value, derivative, response_mask, loss_agg_mode, config), metrics


def clip_bound(magnitude: Tensor, threshold: float) -> Tensor:
    """The bound tau on |log r| of the authors' code, 0-d; inf where the second moment is within the threshold.

    With the n squares of the trust region in ascending order, tau^2 is the last v_j before the first v_k for which
    v_1 + ... + v_k + (n - k) v_k, the sum after clipping at v_k, reaches the threshold times n; 0 if that is the first.

    Args:
        magnitude: |log r| on trust-region tokens, 0 elsewhere, any shape.
        threshold: Budget of the mean of (log r)^2.
    """
    ascending = magnitude.flatten().sort().values
    squares = ascending.double().square()
    larger = torch.arange(squares.numel() - 1, -1, -1, device=squares.device)
    clipped_sums = squares.cumsum(0) + squares * larger
    # Tokens outside the trust region are zeros at the front: they add nothing, and are not counted in the budget.
    budget = threshold * torch.count_nonzero(magnitude)
    reaches = (clipped_sums >= budget) & (ascending > 0)
    first = torch.where(reaches.any(), reaches.int().argmax(), reaches.numel())
    before = torch.cat((ascending.new_zeros(1), ascending)).index_select(0, first.reshape(1)).squeeze(0)
    return torch.where(squares.sum() <= budget, torch.inf, before)
