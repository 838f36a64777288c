"""Decide about the same tokens, split in many ways over micro-batches and ranks."""

import torch
import torch.distributed as dist

from verl_m2po.second_moment import find_trust_region, trust_region_magnitude


def decisions(batches, threshold, micro_batch_counts):
    """{(batch, micro-batches): threshold on |log r|} as this rank sees it, with each rank holding every n-th row."""
    found = {}
    for batch, (log_ratio, advantages, response_mask) in enumerate(batches):
        for count in micro_batch_counts:
            rows = torch.arange(dist.get_rank(), log_ratio.shape[0], dist.get_world_size())
            # More micro-batches than rows: some are empty of tokens, as verl's padding rows are.
            magnitudes = [
                trust_region_magnitude(log_ratio[part], advantages[part], response_mask[part])
                for part in rows.tensor_split(count)
            ]
            found[batch, count] = find_trust_region(magnitudes, threshold, dist.group.WORLD).threshold_log_ratio
    return found
