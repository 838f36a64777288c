"""One process of a group that forms an effective sample share together."""

import sys

import torch
import torch.distributed as dist

from verl_m2po.losses.step_scale import effective_sample_share


def run(rank: int, world_size: int, path: str) -> None:
    """Rank 0 has all responses but those of rank 1; a third has none."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    shares = {0: [500.0, -3.0, 499.0], 1: [498.5], 2: []}
    share = effective_sample_share(torch.tensor(shares[rank]), dist.group.WORLD)
    dist.destroy_process_group()
    sys.stdout.write(f"{share:.12f}\n")


if __name__ == "__main__":
    run(int(sys.argv[1]), 3, sys.argv[2])
