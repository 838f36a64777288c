"""The loss of the authors' released code as its description goes: a Python loop over tokens, two reads of each.

Only for comparison of cost; the loss `m2po_clip` does the same without the loop.
"""

import math
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import ActorConfig


def authors_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: ActorConfig,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """max(-A r, -A clip(r)) with bounds exp(-tau) and exp(tau) from a walk over the sorted squares."""
    log_ratio = log_prob - old_log_prob
    ratio = torch.exp(log_ratio)
    sign = torch.sign(advantages[:, :1])
    harmful = ((sign > 0) & (ratio > 1) | (sign < 0) & (ratio < 1)) & response_mask
    tau = walk(log_ratio.detach()[harmful].square(), config.policy_loss.get("m2po_clip").threshold)
    low, high = (0.0, 1e5) if tau is None else (math.exp(-tau), math.exp(tau))
    losses = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, low, high))
    metrics = {"clipped": ((ratio < low) | (ratio > high)).float().mean().item(), "ratio": ratio.mean().item()}
    return agg_loss(losses, response_mask, loss_agg_mode, **config.global_batch_info), metrics


def walk(squares: Tensor, budget: float) -> float | None:
    """tau, None where the mean is within the budget: two `.item()` for each token, as in the released code."""
    count = squares.numel()
    if squares.mean().item() <= budget:
        return None
    ascending = squares.sort().values
    seen = 0.0
    for k in range(count):
        seen += ascending[k].item()
        if ascending[k].item() * (count - 1 - k) + seen >= budget * count:
            return math.sqrt(ascending[max(k - 1, 0)].item())
    return None
