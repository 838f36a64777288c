"""A decision over ranks that have a device each."""

import torch.distributed as dist

from verl_m2po.second_moment import find_trust_region, trust_region_magnitude


def decide(columns, threshold, device):
    """The threshold on |log r| that this rank finds, holding every n-th row of `columns` on its own device."""
    place = f"cuda:{dist.get_rank()}" if device == "cuda" else device
    own = [column[dist.get_rank() :: dist.get_world_size()].to(place) for column in columns]
    return find_trust_region([trust_region_magnitude(*own)], threshold, dist.group.WORLD).threshold_log_ratio.cpu()
