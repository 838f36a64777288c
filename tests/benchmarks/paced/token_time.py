"""A rollout server whose every decoding step takes a given time, whatever else the machine does."""

import os
import time

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from benchmarks.paced import SECONDS_PER_TOKEN


class TokenTime(LogitsProcessor):
    """vLLM calls it once in each engine step, for all sequences together; the logits stay as they are."""

    def __init__(self, vllm_config: object, device: torch.device, is_pin_memory: bool) -> None:
        self._seconds = float(os.environ.get(SECONDS_PER_TOKEN, 0))
        self._next_at = 0.0

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        time.sleep(max(0.0, self._next_at - time.monotonic()))
        self._next_at = time.monotonic() + self._seconds
        return logits

    def is_argmax_invariant(self) -> bool:
        # Not for greedy decoding alone: a processor that may be skipped would take no time.
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        return
