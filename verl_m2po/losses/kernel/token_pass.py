"""One pass over the tokens of a micro-batch: their importance-weighted advantages, which of them are kept, and sums.

The tokens are taken in chunks that stay in the cache, with masks as floats that multiply, which costs a fraction of
selecting. Nothing is read back from an accelerator.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from verl_m2po.losses.kernel.diagnostics import TOKEN_SUMS
from verl_m2po.second_moment import TrustRegionSearch, check_tokens, chunk_size, on_host

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
    if response_mask.dtype == torch.bool:
        # The same bytes, which become floats several times as fast.
        response_mask = response_mask.view(torch.uint8)
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
        search.add(chunk.rows[1])
    return search


def weigh(tokens: Tokens, threshold_log_ratio: Tensor | float) -> Weighted:
    """Importance-weighted advantages where trust-region tokens with |log r| above the threshold are not kept.

    Args:
        tokens: See `as_tokens`.
        threshold_log_ratio: 0-d; inf keeps every finite response token.
    """
    device, count = tokens.log_prob.device, tokens.log_prob.numel()
    if not isinstance(threshold_log_ratio, Tensor):
        # Not `torch.tensor`, which would copy from the host and wait for it.
        threshold_log_ratio = torch.full((), threshold_log_ratio, dtype=tokens.dtype, device=device)
    gain = torch.empty(count, dtype=tokens.dtype, device=device)
    keep = torch.empty(count, dtype=torch.bool, device=device)
    sums = torch.zeros(len(TOKEN_SUMS), dtype=torch.float64, device=device)
    for chunk in _chunks(tokens):
        log_ratio, magnitude, kept_magnitude, ratio, counted, kept = chunk.rows
        torch.le(magnitude, threshold_log_ratio, out=kept).mul_(counted)
        keep[chunk.where] = kept
        torch.mul(magnitude, kept, out=kept_magnitude)
        torch.exp(log_ratio if chunk.is_ordinary else log_ratio.clamp(max=LOG_RATIO_LIMIT), out=ratio).mul_(kept)
        chunk_gain = torch.mul(ratio, tokens.advantages[chunk.where], out=gain[chunk.where])
        if not chunk.is_ordinary:
            chunk_gain.mul_(log_ratio <= LOG_RATIO_LIMIT)
        if tokens.weights is not None:
            chunk_gain.mul_(tokens.weights[chunk.where])
        sums += torch.cat(
            (
                chunk.rows.sum(1),
                torch.linalg.vector_norm(chunk.rows[_SQUARED], dim=1).square_(),
                torch.sign(chunk.rows[_MAGNITUDES]).sum(1),
                torch.stack((chunk_gain.sum(), chunk_gain.abs().sum(), chunk.responses)),
            )
        )
    return Weighted(gain.view(tokens.shape), keep.view(tokens.shape), sums)


# Rows of a chunk: log ratio, magnitude, kept magnitude, kept ratio, counted, kept. See `diagnostics.TOKEN_SUMS`.
_ROWS = 6
_SQUARED = slice(0, 4)
_MAGNITUDES = slice(1, 3)


class _Chunk(NamedTuple):
    where: slice
    # [6, tokens], of which are filled:
    # log r, 0 on tokens that are not counted;
    # |log r| on trust-region tokens, 0 elsewhere;
    # 1 on counted tokens, which are finite response tokens, 0 elsewhere.
    rows: Tensor
    # Number of response tokens, 0-d.
    responses: Tensor
    # Whether all log ratios are known to be finite and at most `LOG_RATIO_LIMIT`.
    is_ordinary: bool


def _chunks(tokens: Tokens) -> Iterator[_Chunk]:
    if tokens.seen:
        yield from tokens.seen
        return
    size, count = chunk_size(tokens.log_prob), tokens.log_prob.numel()
    rows = torch.empty(_ROWS, min(size, count), dtype=tokens.dtype, device=tokens.log_prob.device)
    for start in range(0, count, size):
        where = slice(start, min(start + size, count))
        chunk = _fill(tokens, where, rows[:, : where.stop - start])
        if count <= size:
            tokens.seen.append(chunk)
        yield chunk


def _fill(tokens: Tokens, where: slice, rows: Tensor) -> _Chunk:
    log_ratio, magnitude, counted = rows[0], rows[1], rows[4]
    torch.sub(tokens.log_prob[where].to(tokens.dtype), tokens.old_log_prob[where], out=log_ratio)
    counted.copy_(tokens.response_mask[where])
    responses = counted.sum()
    # All batches but broken ones are ordinary, which on the CPU is quickly seen. An accelerator would have to wait.
    is_ordinary = on_host(log_ratio) and log_ratio.abs().amax().item() <= LOG_RATIO_LIMIT
    if not is_ordinary:
        counted.mul_(log_ratio.isfinite())
        log_ratio.nan_to_num_(0.0, 0.0, 0.0)
    log_ratio.mul_(counted)
    # sign(A) * log r is positive exactly on the trust region; a product A * log r could underflow to 0.
    torch.sign(tokens.advantages[where].to(tokens.dtype), out=magnitude).mul_(log_ratio).relu_()
    return _Chunk(where, rows, responses, is_ordinary)
