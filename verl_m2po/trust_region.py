"""How the decision over a whole optimizer mini-batch reaches a loss that verl calls per micro-batch.

The actor worker opens a `MiniBatch` around verl's `train_batch`; the losses read the decision from it and leave their
sums in it. Nothing is open under an actor worker that is not ours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from verl_m2po.second_moment import TrustRegion


@dataclass
class MiniBatch:
    """What is shared by all micro-batches of one optimizer mini-batch.

    Args:
        region: The decision over the whole mini-batch, if it was made beforehand.
        decide_in_loss: The loss sees the whole mini-batch of its rank at once, so it makes the decision itself.
        group: Ranks that decide together where `decide_in_loss`; None: this process alone.
        sums: One vector of `losses.diagnostics.SUMS` for each micro-batch so far.
        keep: Keep mask of the micro-batch at hand, where its loss masks.
    """

    region: TrustRegion | None = None
    decide_in_loss: bool = False
    group: dist.ProcessGroup | None = None
    sums: list[Tensor] = field(default_factory=list)
    keep: Tensor | None = None


_current: ContextVar[MiniBatch | None] = ContextVar("verl_m2po_mini_batch", default=None)


def current_mini_batch() -> MiniBatch | None:
    """The optimizer mini-batch that is being trained, None outside our actor worker."""
    return _current.get()


@contextmanager
def training(mini_batch: MiniBatch) -> Iterator[MiniBatch]:
    """Make `mini_batch` the one that losses see."""
    token = _current.set(mini_batch)
    try:
        yield mini_batch
    finally:
        _current.reset(token)
