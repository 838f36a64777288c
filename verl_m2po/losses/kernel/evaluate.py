"""The way from a rule for tokens to a loss of verl, in one place for all families.

A rule says what a token's loss and its derivative are; here are done once, for all of them: dropping tokens without a
finite log ratio, verl's rollout correction weights, off-policy sequence masking, the diagnostics, and verl's
aggregation with a gradient that is exactly 0 on dropped tokens.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from verl.trainer.ppo.core_algos import agg_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import averaged_log_prob, decision_of
from verl_m2po.losses.kernel.record import Call, Loss, TokenLoss
from verl_m2po.losses.kernel.sequence_mask import sequences_kept
from verl_m2po.losses.kernel.settings import KEY
from verl_m2po.losses.kernel.tokens import Tokens, as_numbers, row_groups, tokens_of, zero_outside
from verl_m2po.second_moment import on_host


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
        micro_batch = _MicroBatch(call, _averaged(loss))
        decided = _decision(loss, micro_batch, settings, call.config)
        result = _Result(call.log_prob.shape)
        for rows, tokens in micro_batch.groups():
            _evaluate_rows(loss, tokens, call.config, result, rows, settings, *decided)
        metrics = diagnostics.report(torch.stack(result.sums).sum(0), result.tensors["keep"], result.region)
    return _aggregate(call, result), {**result.metrics, **metrics}


class _MicroBatch:
    """The tokens of a call, in groups of rows that stay in the cache, which halves the time on a CPU.

    They are made anew whenever they are asked for, which takes less than to fetch them from memory; those of a single
    group are kept.
    """

    def __init__(self, call: Call, averaged: Tensor | None):
        self._call, self._averaged = call, averaged
        self._rows = row_groups(call.log_prob)
        self._only: Tokens | None = None

    def groups(self) -> Iterator[tuple[slice, Tokens]]:
        """Rows, and their tokens."""
        if len(self._rows) == 1:
            self._only = self._tokens(self._rows[0]) if self._only is None else self._only
            yield self._rows[0], self._only
            return
        for rows in self._rows:
            yield rows, self._tokens(rows)

    def _tokens(self, rows: slice) -> Tokens:
        call, weights = self._call, self._call.rollout_is_weights
        return tokens_of(
            call.log_prob[rows],
            call.old_log_prob[rows],
            call.advantages[rows],
            call.response_mask[rows],
            None if weights is None else weights[rows],
            None if self._averaged is None else self._averaged[rows],
        )


class _Result:
    """What all groups of rows of a micro-batch, [batch, response], make together; each writes its rows in their place.

    Args:
        shape: Of the micro-batch.
    """

    def __init__(self, shape: torch.Size):
        self._shape = shape
        self.tensors: dict[str, Tensor] = {}
        self.sums: list[Tensor] = []
        self.metrics: dict[str, Any] = {}
        self.region: Any = None

    def place(self, name: str, rows: slice, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Some rows of the tensor `name`, to write into."""
        if name not in self.tensors:
            self.tensors[name] = torch.empty(self._shape, dtype=dtype, device=device)
        return self.tensors[name][rows]


def _averaged(loss: Loss) -> Tensor | None:
    return None if loss.averaging_decay is None else averaged_log_prob(f"{KEY}.loss_mode={loss.name}")


def _decision(loss: Loss, micro_batch: _MicroBatch, settings: Any, config: ActorConfig) -> tuple[Any, ...]:
    """What a loss with a decision is given as third argument."""
    decision = loss.decision
    if decision is None:
        return ()

    def search() -> Any:
        searched = decision.search(settings, 0.0)
        for _, tokens in micro_batch.groups():
            searched.add(deciding_tokens(loss, tokens, config))
        return searched

    return (decision_of(f"{KEY}.{loss.name}.scope", decision.scope(settings), search),)


def _evaluate_rows(loss: Loss, tokens: Tokens, config: ActorConfig, result: _Result, rows: slice, *given: Any) -> None:
    """Put value, derivative and keep mask of `tokens`, which are those of `rows`, into `result`, and add their sums."""
    assert loss.rule is not None
    behaviour = loss.behaviour(tokens)
    left = sequences_kept(behaviour, config)
    seen = tokens if left is None or not loss.masks_sequences_first else tokens.only(left)
    found = _weighted(loss, seen, loss.rule(seen, *given))
    counts = tokens.mask if left is None else tokens.mask & left

    def zero_outside_in_place(name: str, mask: Tensor, values: Tensor) -> Tensor:
        place = result.place(name, rows, values.dtype, values.device)
        return zero_outside(mask, values, as_numbers(mask, values.dtype), place)

    keep = torch.logical_and(found.keep, counts, out=result.place("keep", rows, torch.bool, counts.device))
    derivative = zero_outside_in_place("derivative", keep, found.derivative)
    if found.value is not found.derivative:
        zero_outside_in_place("value", counts, found.value)
    result.sums.append(diagnostics.token_sums(behaviour, keep, derivative))
    result.metrics = {} if found.metrics is None else found.metrics
    result.region = found.region


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


def _aggregate(call: Call, result: _Result) -> Tensor:
    """verl's aggregate of the values with verl's denominator, differentiable in the log-probs by the derivatives."""
    derivative = result.tensors["derivative"]
    losses = _WithGradient.apply(call.log_prob, result.tensors.get("value", derivative), derivative)
    mask = call.response_mask.bool()
    if on_host(mask):
        # verl multiplies with it, forwards and backwards, which takes a CPU several times as long with a bool mask.
        mask = as_numbers(mask)
    return agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=call.loss_agg_mode, **call.config.global_batch_info)
