"""The way from a rule for tokens to a loss of verl, in one place for all families.

A rule says what a token's loss and its derivative are; here are done once, for all of them: dropping tokens without a
finite log ratio, verl's rollout correction weights, off-policy sequence masking, the diagnostics, and verl's
aggregation with a gradient that is exactly 0 on dropped tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import decision_of
from verl_m2po.losses.kernel.record import Call, Loss, TokenLoss
from verl_m2po.losses.kernel.sequence_mask import sequences_kept
from verl_m2po.losses.kernel.settings import KEY
from verl_m2po.losses.kernel.tokens import Tokens, row_groups, tokens_of


def as_policy_loss(loss: Loss) -> Any:
    """`loss` as verl calls it: seven keywords in, the loss and its metrics out."""

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: ActorConfig | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        assert config is not None, "config must be verl's ActorConfig."
        call = Call(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
        loss.accepts(call)
        if loss.around is not None:
            return loss.around(call, loss.settings_in(config))
        return evaluate(loss, call)

    policy_loss.__name__, policy_loss.__module__ = f"{loss.name}_loss", loss.module
    policy_loss.__doc__ = loss.summary
    return policy_loss


def evaluate(loss: Loss, call: Call) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a rule over the tokens of `call`, and metrics where no actor worker of ours collects them.

    All response tokens are in verl's denominator, kept or not.

    Raises:
        RuntimeError: scope=mini_batch, but nobody decided over the mini-batch.
        ValueError: Arguments do not fit each other.
    """
    with torch.no_grad():
        settings = loss.settings_in(call.config)
        # Groups of rows that stay in the cache, which halves the time on a CPU.
        groups = [_Group(call, rows) for rows in row_groups(call.log_prob)]
        decided = _decision(loss, groups, settings, call.config)
        parts = [_part(loss, group.tokens, call.config, settings, *decided) for group in groups]
        sums = torch.stack([part.sums for part in parts]).sum(0)
        value, keep = _joined([part.value for part in parts]), _joined([part.keep for part in parts])
        is_derivative = parts[0].value is parts[0].derivative
        derivative = value if is_derivative else _joined([part.derivative for part in parts])
        metrics = diagnostics.report(sums, keep, parts[-1].region)
    total = _aggregate(call, value, derivative)
    return total, {**parts[-1].metrics, **metrics}


class _Group:
    """Some rows of a micro-batch; their tokens are made where they are first asked for, and once."""

    def __init__(self, call: Call, rows: slice):
        self._call = call
        self._rows = rows

    @cached_property
    def tokens(self) -> Tokens:
        call, weights = self._call, self._call.rollout_is_weights
        return tokens_of(
            call.log_prob[self._rows],
            call.old_log_prob[self._rows],
            call.advantages[self._rows],
            call.response_mask[self._rows],
            None if weights is None else weights[self._rows],
        )


def _decision(loss: Loss, groups: Sequence[_Group], settings: Any, config: ActorConfig) -> tuple[Any, ...]:
    """What a loss with a decision is given as third argument."""
    decision = loss.decision
    if decision is None:
        return ()

    def search() -> Any:
        searched = decision.search(settings, 0.0)
        for group in groups:
            searched.add(deciding_tokens(loss, group.tokens, config))
        return searched

    return (decision_of(f"{KEY}.{loss.name}.scope", decision.scope(settings), search),)


class _Part(NamedTuple):
    """The result for one group of rows."""

    value: Tensor
    derivative: Tensor
    keep: Tensor
    sums: Tensor
    metrics: dict[str, Any]
    region: Any


def _part(loss: Loss, tokens: Tokens, config: ActorConfig, *given: Any) -> _Part:
    assert loss.rule is not None
    behaviour = loss.behaviour(tokens)
    left = sequences_kept(behaviour, config)
    seen = tokens if left is None or not loss.masks_sequences_first else tokens.only(left)
    found = _weighted(loss, seen, loss.rule(seen, *given))
    counts = tokens.mask if left is None else tokens.mask & left
    keep = found.keep & counts
    derivative = found.derivative.masked_fill(~keep, 0.0)
    value = derivative if found.value is found.derivative else found.value.masked_fill(~counts, 0.0)
    sums = diagnostics.token_sums(behaviour, keep, derivative)
    metrics = {} if found.metrics is None else found.metrics
    return _Part(value, derivative, keep, sums, metrics, found.region)


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def deciding_tokens(loss: Loss, tokens: Tokens, config: ActorConfig) -> Tokens:
    """Those of `tokens` that have a say in the decision of `loss`."""
    if not loss.masks_sequences_first:
        return tokens
    left = sequences_kept(loss.behaviour(tokens), config)
    return tokens if left is None else tokens.only(left)


def _weighted(loss: Loss, tokens: Tokens, found: TokenLoss) -> TokenLoss:
    weights = tokens.rollout_is_weights
    if weights is None or loss.weights_in_rule:
        return found
    derivative = found.derivative * weights
    value = derivative if found.value is found.derivative else found.value * weights
    return found._replace(value=value, derivative=derivative)


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


def _aggregate(call: Call, value: Tensor, derivative: Tensor) -> Tensor:
    """verl's aggregate of `value` with verl's denominator, differentiable in the log-probs by `derivative`."""
    losses = _WithGradient.apply(call.log_prob, value, derivative)
    mask = call.response_mask.bool()
    return agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=call.loss_agg_mode, **call.config.global_batch_info)
