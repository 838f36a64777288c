"""The way from a rule for tokens to a loss of verl, in one place for all families.

A family says what a token's loss and its derivative are; here are done once, for all of them: dropping tokens without a
finite log ratio, verl's rollout correction weights, off-policy sequence masking, the diagnostics, and verl's
aggregation with a gradient that is exactly 0 on dropped tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.workers.config import ActorConfig

from verl_m2po.losses.family import opsm
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.surrogate import detached_log_ratio, negative_aggregate
from verl_m2po.losses.kernel.token_pass import LOG_RATIO_LIMIT
from verl_m2po.second_moment import check_tokens


class Tokens(NamedTuple):
    """The tokens of one micro-batch, without gradient; all [batch, response].

    Args:
        log_prob: log-probs under the current policy; 0 outside `mask`.
        log_ratio: log of current over old policy; 0 outside `mask`.
        advantages: Advantage of each token, same dtype as `log_ratio`.
        mask: bool; response tokens with a finite log ratio.
        rollout_is_weights: verl's rollout correction weights, None without.
    """

    log_prob: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    rollout_is_weights: Tensor | None = None

    def sequence_log_ratio(self) -> Tensor:
        """Sum of log ratios over each response, [batch, 1]."""
        return self.log_ratio.sum(-1, keepdim=True)

    def lengths(self) -> Tensor:
        """Tokens of each response, at least 1, [batch, 1]."""
        return self.mask.sum(-1, keepdim=True).clamp(min=1)


class TokenLoss(NamedTuple):
    """What a family makes of `Tokens`; all [batch, response], anything outside their mask.

    Args:
        value: Loss of each token.
        derivative: Its derivative with respect to the token's log-prob.
        keep: bool; tokens to which the rule leaves a gradient (which may be 0 for another reason: advantage 0).
        log_ratio: log of current over behaviour policy for the diagnostics, where that is not `Tokens.log_ratio`.
        metrics: Metrics of the family.
    """

    value: Tensor
    derivative: Tensor
    keep: Tensor
    log_ratio: Tensor | None = None
    metrics: dict[str, Any] | None = None


def importance_weight(log_ratio: Tensor) -> Tensor:
    """r, and 0 where |log r| > 20: there verl's clamp leaves no gradient either."""
    beyond = log_ratio.abs() > LOG_RATIO_LIMIT
    return log_ratio.masked_fill(beyond, 0.0).exp_().masked_fill_(beyond, 0.0)


def evaluate(
    rule: Callable[[Tokens], TokenLoss],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str,
    config: ActorConfig | None,
    rollout_is_weights: Tensor | None = None,
    weights_in_rule: bool = False,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of `rule` in verl's form.

    Args:
        rule: Gives the loss of each token.
        old_log_prob: log-probs under the old policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape. All of it is in the denominator, kept or not.
        loss_agg_mode: verl's name of the aggregation.
        config: verl's actor settings.
        rollout_is_weights: verl's rollout correction weights; None: 1.
        weights_in_rule: The rule makes use of those weights itself; otherwise they multiply each token.

    Returns:
        The loss, and metrics.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    assert config is not None, "config must be verl's ActorConfig."
    with torch.no_grad():
        log_ratio = detached_log_ratio(log_prob, old_log_prob)
        advantages = advantages.to(log_ratio.dtype)
        check_tokens("log_prob", log_ratio, advantages=advantages, response_mask=response_mask)
        response_mask = response_mask.bool()
        tokens = clean_tokens(log_prob, log_ratio, advantages, response_mask, rollout_is_weights)
        loss = rule(tokens)
        if rollout_is_weights is not None and not weights_in_rule:
            loss = loss._replace(value=loss.value * rollout_is_weights, derivative=loss.derivative * rollout_is_weights)
        log_ratio = log_ratio if loss.log_ratio is None else loss.log_ratio
        counts = opsm.restrict(tokens.mask, log_ratio, advantages, response_mask, config)
        keep = loss.keep & counts
        value = torch.where(counts, loss.value, 0.0)
        derivative = torch.where(keep, loss.derivative, 0.0)
        sums = diagnostics.token_sums(log_ratio, advantages, response_mask, keep, derivative)
        metrics = diagnostics.report(sums, keep, None)
    loss_value = negative_aggregate(log_prob, -value, -derivative, response_mask, loss_agg_mode, config)
    return loss_value, {**(loss.metrics or {}), **metrics}


def clean_tokens(
    log_prob: Tensor, log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, weights: Tensor | None = None
) -> Tokens:
    """`Tokens` with zeros wherever a log-prob could spoil a sum.

    Args:
        log_prob: log-probs under the current policy, any shape.
        log_ratio: log of current over old policy, same shape, at least float32.
        advantages: Same shape, dtype of `log_ratio`.
        response_mask: bool, same shape.
        weights: verl's rollout correction weights; None: 1.
    """
    log_prob = log_prob.detach().to(log_ratio.dtype)
    mask = torch.isfinite(log_ratio) & torch.isfinite(log_prob) & response_mask
    return Tokens(torch.where(mask, log_prob, 0.0), torch.where(mask, log_ratio, 0.0), advantages, mask, weights)
