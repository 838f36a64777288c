"""From importance-weighted advantages to verl's loss, with a hand-written gradient.

For the surrogate A r the value of a token and its derivative with respect to log pi are the same number, so one tensor
serves the forward and the backward pass, and a dropped token is exactly 0 in both, whatever its log-probs are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import ActorConfig

from verl_m2po.second_moment import check_tokens


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


def negative_aggregate(
    log_prob: Tensor,
    gain: Tensor,
    derivative: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: ActorConfig,
) -> Tensor:
    """The loss: minus verl's aggregate of `gain`, with verl's denominator, differentiable in `log_prob`.

    Args:
        log_prob: log-probs under the current policy, [batch, response].
        gain: What each token contributes to the objective, same shape.
        derivative: Its derivative with respect to the token's log-prob, same shape; may be `gain` itself.
        response_mask: Tokens that count in the denominator, kept or not.
        loss_agg_mode: verl's name of the aggregation.
        config: verl's actor settings, which carry the size of the whole mini-batch.
    """
    gain_mat = _WithGradient.apply(log_prob, gain, derivative)
    return -agg_loss(
        loss_mat=gain_mat, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
    )


def detached_log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """log of current over old policy without gradient, at least float32.

    Args:
        log_prob: log-probs under the current policy, [batch, response].
        old_log_prob: log-probs under the old policy, same shape.

    Raises:
        ValueError: The shapes differ, or `old_log_prob` requires grad.
    """
    check_tokens("log_prob", log_prob.detach(), old_log_prob=old_log_prob)
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    return log_prob.detach().to(dtype) - old_log_prob
