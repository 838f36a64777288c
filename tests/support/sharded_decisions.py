"""Decide about the same tokens, split in many ways over micro-batches and ranks."""

import torch
import torch.distributed as dist

from verl_m2po.second_moment import find_trust_region, trust_region_magnitude


def decisions(batches, threshold, dp_sizes, micro_batch_counts):
    """{(batch, dp size, micro-batches): threshold on |log r|} as this rank sees it."""
    groups = {size: dist.new_group(list(range(size))) for size in dp_sizes}
    found = {}
    for batch, (log_ratio, advantages, response_mask) in enumerate(batches):
        for size, group in groups.items():
            rank = dist.get_rank()
            if rank >= size:
                continue
            for count in micro_batch_counts:
                rows = torch.arange(rank, log_ratio.shape[0], size)
                # More micro-batches than rows: some are empty of tokens, as verl's padding rows are.
                magnitudes = [
                    trust_region_magnitude(log_ratio[part], advantages[part], response_mask[part])
                    for part in rows.tensor_split(count)
                ]
                found[batch, size, count] = find_trust_region(magnitudes, threshold, group).threshold_log_ratio
    return found
