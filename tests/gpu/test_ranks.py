"""One decision over all ranks, by NCCL where there are GPUs and by gloo where there are none."""

import pytest
import torch
from device_ranks import decide
from ranks import run_on_ranks
from token_batches import heavy_tailed

from verl_m2po.second_moment import find_trust_region, trust_region_magnitude

THRESHOLD = 0.04


@pytest.mark.timeout(240)
def test_all_ranks_decide_as_one(device):
    size = torch.cuda.device_count() if device == "cuda" else 2
    columns = heavy_tailed(16, 300, seed=2)
    backend = "nccl" if device == "cuda" else "gloo"
    found = run_on_ranks((size,), decide, columns, THRESHOLD, device, backend=backend)[size]
    expected = find_trust_region([trust_region_magnitude(*columns)], THRESHOLD).threshold_log_ratio
    assert [float(each) for each in found] == [float(expected)] * size
