"""Ranks that form an effective sample share together."""

import torch
import torch.distributed as dist

from verl_m2po.losses.step_scale import effective_sample_share


def share_of_all() -> torch.Tensor:
    """Rank 0 has all responses but those of rank 1; a third has none."""
    log_weights = ([500.0, -3.0, 499.0], [498.5], [])[dist.get_rank()]
    return torch.tensor(effective_sample_share(torch.tensor(log_weights), dist.group.WORLD), dtype=torch.float64)
