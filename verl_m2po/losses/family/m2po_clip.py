"""The loss `m2po_clip`: the form that the authors of M2PO released, which clips where the paper masks.

Written anew from the description of https://github.com/Infini-AI-Lab/M2PO. It bounds the second moment that remains
after clipping, so it takes the gradient from a superset of the tokens that Algorithm 1 drops.
"""

from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.config import M2POClipConfig
from verl_m2po.losses.family import opsm
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.surrogate import negative_aggregate
from verl_m2po.losses.kernel.token_pass import LOG_RATIO_LIMIT, as_tokens, weigh
from verl_m2po.second_moment import TrustRegion, trust_region_magnitude


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
        trained = opsm.trained_tokens(log_prob, old_log_prob, advantages, response_mask, config)
        tokens = as_tokens(log_prob, old_log_prob, advantages, trained, rollout_is_weights)
        log_ratio = (tokens.log_prob.to(tokens.dtype) - tokens.old_log_prob).view(tokens.shape)
        magnitude = trust_region_magnitude(log_ratio, advantages, trained)
        tau = clip_bound(magnitude, settings.threshold)
        derivative, keep, sums = weigh(tokens, tau)
        bound = torch.exp(torch.sign(advantages) * tau.clamp(max=LOG_RATIO_LIMIT)).mul_(advantages)
        if rollout_is_weights is not None:
            bound.mul_(rollout_is_weights)
        gain = torch.where(magnitude > tau, bound, derivative)
        metrics = diagnostics.report(sums, keep, TrustRegion(tau, magnitude.amax(), tau))
    return negative_aggregate(log_prob, gain, derivative, response_mask, loss_agg_mode, config), metrics


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
