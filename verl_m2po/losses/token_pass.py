"""One pass over the tokens of a micro-batch: their importance-weighted advantages, which of them are kept, and sums.

The tokens are taken in chunks that stay in the cache, with masks as floats that multiply, which costs a fraction of
selecting. Nothing is read back from an accelerator.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from verl_m2po.losses.diagnostics import TOKEN_SUMS
from verl_m2po.second_moment import TrustRegionSearch, check_tokens, chunk_size

# verl clamps log ratios here before it takes the exponential, so that no gradient passes beyond it.
LOG_RATIO_LIMIT = 20.0


class Tokens(NamedTuple):
    """Detached tokens of a micro-batch, flat: log-probs, advantages, the bool response mask, weights (None: 1).

    `seen` keeps the work of the first of two passes where that is little.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    weights: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    seen: list["_Chunk"]


class Weighted(NamedTuple):
    """The result of the pass.

    Args:
        gain: A r, times the weight; exactly 0 on tokens that are not kept. [batch, response].
        keep: bool, same shape; finite response tokens within the threshold.
        sums: float64, by the names of `diagnostics.TOKEN_SUMS`.
    """

    gain: Tensor
    keep: Tensor
    sums: Tensor


def as_tokens(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor, weights: Tensor | None = None
) -> Tokens:
    """The arguments of a loss, checked and without gradient; log ratios will be at least float32.

    Raises:
        ValueError: Shapes or devices differ, or a tensor requires grad that must not; names the argument.
        TypeError: A tensor has the wrong type.
    """
    log_prob = log_prob.detach()
    named = {"old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask}
    if weights is not None:
        named["rollout_is_weights"] = weights
    check_tokens("log_prob", log_prob, **named)
    dtype = torch.promote_types(torch.promote_types(log_prob.dtype, old_log_prob.dtype), torch.float32)
    return Tokens(
        log_prob.reshape(-1),
        old_log_prob.reshape(-1),
        advantages.reshape(-1),
        response_mask.reshape(-1),
        None if weights is None else weights.reshape(-1),
        log_prob.shape,
        dtype,
        [],
    )


def add_tokens(search: TrustRegionSearch, tokens: Tokens) -> TrustRegionSearch:
    """Let `search` see all of `tokens`."""
    for chunk in _chunks(tokens):
        search.add(chunk.magnitude)
    return search


def weigh(tokens: Tokens, threshold_log_ratio: Tensor | float) -> Weighted:
    """Importance-weighted advantages where trust-region tokens with |log r| above the threshold are not kept.

    Args:
        tokens: See `as_tokens`.
        threshold_log_ratio: 0-d; inf keeps every finite response token.
    """
    device = tokens.log_prob.device
    threshold_log_ratio = torch.as_tensor(threshold_log_ratio, dtype=tokens.dtype, device=device)
    gain = torch.empty(tokens.log_prob.numel(), dtype=tokens.dtype, device=device)
    keep = torch.empty(tokens.log_prob.numel(), dtype=torch.bool, device=device)
    sums = torch.zeros(len(TOKEN_SUMS), dtype=torch.float64, device=device)
    for chunk in _chunks(tokens):
        kept = torch.le(chunk.magnitude, threshold_log_ratio, out=torch.empty_like(chunk.magnitude))
        kept.mul_(chunk.counted)
        keep[chunk.where] = kept
        ratio = torch.clamp(chunk.log_ratio, max=LOG_RATIO_LIMIT).exp_().mul_(kept)
        within = torch.le(chunk.log_ratio, LOG_RATIO_LIMIT, out=torch.empty_like(ratio))
        chunk_gain = torch.mul(ratio, tokens.advantages[chunk.where], out=gain[chunk.where]).mul_(within)
        if tokens.weights is not None:
            chunk_gain.mul_(tokens.weights[chunk.where])
        kept_magnitude = kept.mul(chunk.magnitude)
        sums += torch.stack(
            (
                chunk.responses,
                chunk.counted.sum(),
                kept.sum(),
                torch.sign(chunk.magnitude).sum(),
                torch.sign(kept_magnitude).sum(),
                chunk.log_ratio.sum(),
                torch.dot(chunk.log_ratio, chunk.log_ratio),
                torch.dot(chunk.magnitude, chunk.magnitude),
                torch.dot(kept_magnitude, kept_magnitude),
                ratio.sum(),
                torch.dot(ratio, ratio),
                chunk_gain.sum(),
                chunk_gain.abs().sum(),
            )
        )
    return Weighted(gain.view(tokens.shape), keep.view(tokens.shape), sums)


class _Chunk(NamedTuple):
    where: slice
    # 0 on all tokens that are not counted.
    log_ratio: Tensor
    # 1 on finite response tokens, 0 elsewhere.
    counted: Tensor
    # |log r| on trust-region tokens, 0 elsewhere.
    magnitude: Tensor
    # Number of response tokens, 0-d.
    responses: Tensor


def _chunks(tokens: Tokens) -> Iterator[_Chunk]:
    size = chunk_size(tokens.log_prob.device)
    if tokens.seen:
        yield from tokens.seen
        return
    for start in range(0, tokens.log_prob.numel(), size):
        where = slice(start, min(start + size, tokens.log_prob.numel()))
        log_ratio = tokens.log_prob[where].to(tokens.dtype) - tokens.old_log_prob[where]
        counted = tokens.response_mask[where].to(tokens.dtype)
        responses = counted.sum()
        # Finite in all but broken batches, which on the CPU is quickly seen. Where to look would stall, it is assumed.
        if log_ratio.device.type != "cpu" or not log_ratio.sum().isfinite():
            counted.mul_(log_ratio.isfinite())
            log_ratio.nan_to_num_(0.0, 0.0, 0.0)
        log_ratio.mul_(counted)
        # sign(A) * log r is positive exactly on the trust region; a product A * log r could underflow to 0.
        magnitude = torch.sign(tokens.advantages[where]).to(tokens.dtype).mul_(log_ratio).relu_()
        chunk = _Chunk(where, log_ratio, counted, magnitude, responses)
        if tokens.log_prob.numel() <= size:
            tokens.seen.append(chunk)
        yield chunk
