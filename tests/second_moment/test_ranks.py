"""One decision over real data-parallel ranks: the same bits for every way to share out the tokens."""

import math

import pytest
import torch
from ranks import run_on_ranks
from sharded_decisions import decisions
from token_batches import heavy_tailed

from verl_m2po.second_moment import find_trust_region, trust_region_magnitude

pytestmark = pytest.mark.slow

DP_SIZES = (1, 2, 4)
MICRO_BATCHES = (1, 2, 3, 7)


def test_same_bits_for_every_dp_size_micro_batch_split_and_order():
    plain = [heavy_tailed(12, 37, seed) for seed in range(4)]
    tied = [tuple(torch.full((12, 37), value) for value in (0.5, 1.0, 1.0))]
    in_double = [heavy_tailed(12, 37, 9, torch.float64)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = [tuple(tensor[order] for tensor in plain[0])]
    broken = [tuple(tensor.clone() for tensor in plain[1])]
    broken[0][0][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    all_above = [(torch.sign(a) * (d.abs() + 1), a, m) for d, a, m in plain[:1]]
    no_trust_region = [(d, torch.zeros_like(a), m) for d, a, m in plain[:1]]
    batches = [*plain, *tied, *in_double, *shuffled, *broken, *all_above, *no_trust_region]
    expected = [find_trust_region([trust_region_magnitude(*b)], 0.04).threshold_log_ratio for b in batches]
    for size, by_rank in run_on_ranks(DP_SIZES, decisions, batches, 0.04, MICRO_BATCHES).items():
        for found in by_rank:
            assert len(found) == len(batches) * len(MICRO_BATCHES)
            for (batch, count), threshold_log_ratio in found.items():
                assert torch.equal(threshold_log_ratio, expected[batch]), (batch, size, count)
    # The shuffled sequences are the first batch again.
    assert torch.equal(expected[6], expected[0]) and torch.isfinite(expected[0])
