"""A trainer whose every update takes longer by a given time."""

import os
import time
from collections.abc import Callable

import torch

from benchmarks.paced import SECONDS_PER_UPDATE


class PacedAdamW(torch.optim.AdamW):
    """AdamW that sleeps before each step."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        time.sleep(float(os.environ.get(SECONDS_PER_UPDATE, 0)))
        return super().step(closure)
