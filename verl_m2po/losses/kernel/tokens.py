"""The tokens of a micro-batch, computed once: what losses, look-ahead, diagnostics and masks all look at."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from verl_m2po.second_moment import check_tokens, chunk_size, on_host, trust_region_magnitude

# verl clamps log ratios here before it takes the exponential, so that no gradient passes beyond it.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Tokens:
    """The tokens of one micro-batch, without gradient; all [batch, response]. Made by `tokens_of`.

    Whatever stands outside `mask` is replaced by 0, except in what is called raw, so nothing there can spoil a sum.

    Args:
        log_ratio: log of current over old policy, at least float32; 0 outside `mask`.
        raw_advantages: Advantages as they came.
        mask: bool; response tokens with a finite log ratio.
        counted: `mask` as 0 and 1, same dtype as `log_ratio`.
        response_mask: bool; all response tokens, which count in denominators.
        raw_log_prob: log-probs under the current policy as they came.
        rollout_is_weights: verl's rollout correction weights, same dtype as `log_ratio`; 0 outside `mask`. None: 1.
        averaged_log_prob: log-probs under an average of weights as they came; None for a loss that has no use for them.
        is_ordinary: All |log r| are known to be at most 20, as in all batches but broken ones; never on an accelerator,
            which would have to be waited for.
    """

    log_ratio: Tensor
    raw_advantages: Tensor
    mask: Tensor
    counted: Tensor
    response_mask: Tensor
    raw_log_prob: Tensor
    rollout_is_weights: Tensor | None = None
    averaged_log_prob: Tensor | None = None
    is_ordinary: bool = False

    @cached_property
    def log_prob(self) -> Tensor:
        """log-probs under the current policy, same dtype as `log_ratio`; 0 outside `mask`."""
        return zero_outside(self.mask, self.raw_log_prob.to(self.log_ratio.dtype), self.counted)

    @cached_property
    def advantages(self) -> Tensor:
        """Advantages, same dtype as `log_ratio`; 0 outside `mask`."""
        return zero_outside(self.mask, self.raw_advantages.to(self.log_ratio.dtype), self.counted)

    @cached_property
    def magnitude(self) -> Tensor:
        """|log r| on trust-region tokens (A > 0 and r > 1, or A < 0 and r < 1), 0 on all others."""
        # Of an advantage only the sign counts, and outside `mask` the log ratio is 0: a search needs no more of them.
        return trust_region_magnitude(self.log_ratio, self.raw_advantages)

    @cached_property
    def importance_weight(self) -> Tensor:
        """r, and 0 where |log r| > 20; 1 outside `mask`."""
        return self.log_ratio.exp() if self.is_ordinary else importance_weight(self.log_ratio)

    def sequence_log_ratio(self) -> Tensor:
        """Sum of log ratios over each response, [batch, 1]."""
        return self.log_ratio.sum(-1, keepdim=True)

    def lengths(self) -> Tensor:
        """Tokens of each response, at least 1, [batch, 1]."""
        return self.mask.sum(-1, keepdim=True).clamp(min=1)

    def only(self, kept: Tensor) -> "Tokens":
        """The same tokens as if those outside `kept`, bool [batch, response], had no finite log ratio."""
        mask = self.mask & kept
        counted = as_numbers(mask, self.log_ratio.dtype)
        weights = self.rollout_is_weights
        return dataclasses.replace(
            self,
            log_ratio=zero_outside(mask, self.log_ratio, counted),
            mask=mask,
            counted=counted,
            rollout_is_weights=None if weights is None else zero_outside(mask, weights, counted),
        )


def tokens_of(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    rollout_is_weights: Tensor | None = None,
    averaged_log_prob: Tensor | None = None,
) -> Tokens:
    """The arguments of a loss as `Tokens`. The one place where log pi - log pi_old is taken.

    Args:
        log_prob: log-probs under the current policy, [batch, response].
        old_log_prob: log-probs under the old policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool or 0/1, same shape. Whatever the others hold outside it does not matter.
        rollout_is_weights: verl's rollout correction weights, same shape; None: 1.
        averaged_log_prob: log-probs under an average of weights, same shape; None: not needed.

    Raises:
        ValueError: Shapes or devices differ, or a tensor requires grad that must not; names the argument.
        TypeError: A tensor has the wrong type.
    """
    log_prob = log_prob.detach()
    named = {"old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask}
    if rollout_is_weights is not None:
        named["rollout_is_weights"] = rollout_is_weights
    if averaged_log_prob is not None:
        named["averaged_log_prob"] = averaged_log_prob
    check_tokens("log_prob", log_prob, **named)
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    response_mask = mask = response_mask.bool()
    counted = as_numbers(mask, dtype)
    log_ratio = _ordinary_log_ratio(log_prob, old_log_prob, counted) if on_host(log_prob) else None
    is_ordinary = log_ratio is not None
    if log_ratio is None:
        log_ratio = log_prob.to(dtype) - old_log_prob
        # A log ratio is finite only if both log-probs are. `isfinite` takes twice as long.
        mask = (log_ratio.abs() <= torch.finfo(dtype).max) & response_mask
        log_ratio.masked_fill_(~mask, 0.0)
        counted = as_numbers(mask, dtype)
    return Tokens(
        log_ratio,
        advantages,
        mask,
        counted,
        response_mask,
        log_prob,
        None if rollout_is_weights is None else zero_outside(mask, rollout_is_weights.to(dtype), counted),
        averaged_log_prob,
        is_ordinary,
    )


def _ordinary_log_ratio(log_prob: Tensor, old_log_prob: Tensor, counted: Tensor) -> Tensor | None:
    """log_prob - old_log_prob where `counted` is 1, 0 elsewhere; None if any is NaN or beyond verl's limit."""
    log_ratio = (log_prob.to(counted.dtype) - old_log_prob).mul_(counted)
    if not log_ratio.numel():
        return log_ratio
    smallest, largest = (limit.item() for limit in log_ratio.aminmax())
    return log_ratio if smallest >= -LOG_RATIO_LIMIT and largest <= LOG_RATIO_LIMIT else None


# A CPU takes ten times as long for torch's selections and comparisons, one number at a time, as for products.


def zero_outside(mask: Tensor, values: Tensor, numbers: Tensor, out: Tensor | None = None) -> Tensor:
    """`values` where `mask`, and 0 elsewhere, whatever stands there.

    Args:
        mask: bool, shape of `values`.
        values: Floating point.
        numbers: `mask` as 0 and 1.
        out: Where the result goes, of the dtype of `values`; None: a new tensor.
    """
    if on_host(values):
        product = torch.mul(values, numbers, out=out)
        # NaN and inf survive a product, and then show in the sum.
        if math.isfinite(product.sum().item()):
            return product
    selected = values.masked_fill(~mask, 0.0)
    return selected if out is None else out.copy_(selected)


def as_numbers(mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A bool tensor as 0 and 1."""
    return mask.contiguous().view(torch.uint8).to(dtype)


def at_most(values: Tensor, limit: Tensor) -> Tensor:
    """values <= limit, bool; NaN is not.

    Args:
        values: Floating point, any shape.
        limit: 0-d.
    """
    return torch.le(values, limit, out=torch.empty_like(values)).bool()


def tapered(advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """The weights of tapered off-policy REINFORCE (arXiv:2503.14286): 1 where A > 0, min(ratio, 1) elsewhere.

    Args:
        advantages: Floating point, [batch, response].
        log_ratio: Of what tapers a token, log of current over behaviour policy, [batch, response] or [batch, 1].
    """
    return torch.where(advantages > 0, 1.0, log_ratio.clamp(max=0.0).exp())


def row_groups(tokens: Tensor) -> list[slice]:
    """Rows of `tokens`, [batch, response], in groups to work on at once; at least one, which may be empty."""
    rows, width = tokens.shape[0], max(1, tokens.shape[-1])
    size = max(1, chunk_size(tokens) // width)
    return [slice(start, start + size) for start in range(0, max(1, rows), size)]


def importance_weight(log_ratio: Tensor) -> Tensor:
    """r, and 0 where |log r| > 20: there verl's clamp leaves no gradient either."""
    return log_ratio.exp().masked_fill_(log_ratio.abs() > LOG_RATIO_LIMIT, 0.0)
