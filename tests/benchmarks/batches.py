"""Batches whose trust region loses a given share of all tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

RESPONSE_TOKENS = 1024


class Batch(NamedTuple):
    """Arguments of a loss, [batch, response], and the threshold at which m2po drops the share that was asked for."""

    old_log_prob: Tensor
    log_prob: Tensor
    advantages: Tensor
    response_mask: Tensor
    threshold: float


def make_batch(tokens: int, masked_fraction: float, dtype: torch.dtype, device: str, seed: int = 0) -> Batch:
    """Laplace-distributed log ratios, one advantage per sequence, 10% padding.

    Args:
        tokens: Size of the batch, a multiple of `RESPONSE_TOKENS`.
        masked_fraction: Share of all response tokens that the threshold is to drop.
        dtype: Of the log-probs.
        device: Where the tokens are.
        seed: Of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens // RESPONSE_TOKENS, RESPONSE_TOKENS)
    uniform = torch.rand(shape, generator=generator) - 0.5
    log_ratio = -0.15 * torch.sign(uniform) * torch.log1p(-2 * uniform.abs())
    old_log_prob = -2 * torch.rand(shape, generator=generator)
    log_prob = (old_log_prob + log_ratio).to(dtype)
    old_log_prob = old_log_prob.to(dtype)
    advantages = torch.randn(shape[0], 1, generator=generator).expand(shape).contiguous()
    response_mask = torch.arange(RESPONSE_TOKENS).expand(shape) < 0.9 * RESPONSE_TOKENS
    log_ratio = log_prob.float() - old_log_prob.float()
    inside = (torch.sign(advantages) * log_ratio > 0) & response_mask
    squares = log_ratio[inside].double().square().sort().values
    kept = squares.numel() - round(masked_fraction * int(response_mask.sum()))
    threshold = squares[:kept].mean().item()
    return Batch(
        old_log_prob.to(device), log_prob.to(device), advantages.to(device), response_mask.to(device), threshold
    )
