"""The part that all losses of this package share: importance-weighted advantages with a hand-written gradient.

For the surrogate -A r the value of a token and its derivative with respect to log pi are the same number, so one tensor
serves the forward and the backward pass, and a dropped token is exactly 0 in both, whatever its log-probs are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import ActorConfig

# verl clamps log ratios here before it takes the exponential; beyond it the gradient is 0.
LOG_RATIO_LIMIT = 20.0


class _WithGradient(torch.autograd.Function):
    """`value`, with `derivative` as its elementwise derivative with respect to `log_prob`."""

    @staticmethod
    def forward(ctx: Any, log_prob: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        ctx.dtype = log_prob.dtype
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return (grad_output * derivative).to(ctx.dtype), None, None


def detached_log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """log of current over behaviour policy without gradient, at least float32.

    Args:
        log_prob: log-probs under the current policy, [batch, response].
        old_log_prob: log-probs under the behaviour policy, same shape.

    Raises:
        ValueError: The shapes differ, or `old_log_prob` requires grad.
    """
    if old_log_prob.shape != log_prob.shape:
        raise ValueError(
            f"old_log_prob has shape {tuple(old_log_prob.shape)}, but log_prob has {tuple(log_prob.shape)}."
        )
    if old_log_prob.requires_grad:
        raise ValueError("old_log_prob requires grad, but the behaviour policy is fixed: pass it detached.")
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    return log_prob.detach().to(dtype) - old_log_prob


def importance_ratio(log_ratio: Tensor) -> Tensor:
    """r, with log r clamped at +-20."""
    return torch.clamp(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp_()


def negative_weighted_advantage(
    log_ratio: Tensor, advantages: Tensor, keep: Tensor, rollout_is_weights: Tensor | None
) -> Tensor:
    """-A r on kept tokens, exactly 0 elsewhere, with log r clamped at +-20; not differentiable."""
    weighted = importance_ratio(log_ratio).mul_(advantages).neg_()
    if rollout_is_weights is not None:
        weighted.mul_(rollout_is_weights)
    return weighted.masked_fill_(~keep, 0.0)


def aggregate(
    log_prob: Tensor,
    value: Tensor,
    derivative: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: ActorConfig,
) -> Tensor:
    """verl's aggregate of `value` with verl's denominator, differentiable with respect to `log_prob`.

    Args:
        log_prob: log-probs under the current policy, [batch, response].
        value: Loss of each token, same shape.
        derivative: Its derivative with respect to the token's log-prob, same shape.
        response_mask: Tokens that count in the denominator, kept or not.
        loss_agg_mode: verl's name of the aggregation.
        config: verl's actor settings, which carry the size of the whole mini-batch.
    """
    loss_mat = _WithGradient.apply(log_prob, value, derivative)
    return agg_loss(loss_mat=loss_mat, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
