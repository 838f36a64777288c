"""How long a loss takes and how much memory it holds: numbers for the end of the output, no limits."""

import time

import pytest
import torch

from benchmarks.batches import RESPONSE_TOKENS, make_batch
from benchmarks.measure import CONTESTANTS, Call, median, peak_tensors

ROUNDS = 20
NAMES = ("vanilla", "gspo", "m2po, given threshold", "m2po, micro_batch")
TOKENS = {"cpu": (8 * RESPONSE_TOKENS,), "cuda": (205 * RESPONSE_TOKENS, 4096 * RESPONSE_TOKENS)}


def seconds(call: Call) -> float:
    """One call, forward and backward: by events where a GPU works, else by the clock."""
    if not call.batch.log_prob.is_cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@pytest.mark.parametrize("size", [0, 1], ids=["210k tokens", "4M tokens"])
def test_speed_and_memory(device, size, measured):
    if size >= len(TOKENS[device]):
        pytest.skip("one small size on the processor")
    tokens = TOKENS[device][size]
    batch = make_batch(tokens, masked_fraction=0.01, dtype=torch.float32, device=device)
    for contestant in CONTESTANTS:
        if contestant.name not in NAMES:
            continue
        call = Call(contestant, batch)
        call()  # kernels are compiled and memory is reserved
        taken = [seconds(call) for _ in range(ROUNDS)]
        where = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
        measured.append(
            f"{where}, {tokens} tokens, {contestant.name}: {1000 * median(taken):.3f} ms (median of {ROUNDS}), "
            f"peak {peak_tensors(call):.1f} x log-probs"
        )
        assert len(taken) == ROUNDS
