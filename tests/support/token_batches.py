"""Batches of response tokens with everything in them that could make a decision depend on its circumstances."""

import torch


def heavy_tailed(rows, columns, seed, dtype=torch.float32):
    """Log ratios with a heavy tail, many of them exactly equal, advantages of both signs and 0, a mask with gaps."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns)
    log_ratio = 0.1 * torch.randn(shape, generator=generator) / torch.rand(shape, generator=generator).clamp(min=1e-3)
    tied = torch.rand(shape, generator=generator) < 0.3
    log_ratio = torch.where(tied, (log_ratio * 16).round() / 16, log_ratio).to(dtype)
    advantages = torch.randn(shape, generator=generator).to(dtype)
    advantages[torch.rand(shape, generator=generator) < 0.1] = 0.0
    response_mask = torch.rand(shape, generator=generator) < 0.8
    response_mask[0, 0] = True
    return log_ratio, advantages, response_mask
