"""How a decision over a whole optimizer mini-batch reaches a loss that verl calls per micro-batch.

The actor worker opens a `MiniBatch` around verl's `train_batch`; the losses read the decision from it and leave their
sums in it. Nothing is open under an actor worker that is not ours.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from verl_m2po.second_moment import TrustRegion

SCOPES = ("mini_batch", "micro_batch")

Decision = TypeVar("Decision", covariant=True)


class Search(Protocol[Decision]):
    """What sees the tokens that decide together, one part after the other."""

    def add(self, tokens: Any) -> Any:
        """See the `Tokens` of a micro-batch, or of some of its rows."""
        ...

    def solve(self, group: dist.ProcessGroup | None = None) -> Decision:
        """The decision over all that was seen on all ranks of `group` (None: this process alone)."""
        ...


@dataclass
class MicroBatchSums:
    """What the loss of one micro-batch leaves, without gradient and on the device of the tokens.

    Args:
        tokens: float64, by the names of `diagnostics.TOKEN_SUMS`.
        region: The trust region that held for it, None for a loss without one.
        age_zero: By the names of `AGE_ZERO_SUMS`, None where nobody knows ages.
        entropy: By the names of `ENTROPY_SUMS`, None where entropies are not computed.
    """

    tokens: Tensor
    region: TrustRegion | None
    age_zero: Tensor | None = None
    entropy: Tensor | None = None


@dataclass
class MiniBatch:
    """What is shared by all micro-batches of one optimizer mini-batch.

    Args:
        decision: The loss's own decision over the whole mini-batch, if it was made beforehand.
        decide_in_loss: The loss sees the whole mini-batch of its rank at once, so it makes the decision itself.
        group: Ranks that decide together where `decide_in_loss`; None: this process alone.
        sums: Of each micro-batch so far.
        keep: Keep mask of the micro-batch at hand, where its loss masks.
        weighs_responses: Whether `log_weights` are to be left.
        log_weights: log of current over behaviour policy of each response so far, [responses] for each micro-batch.
        metrics: What was found about the whole mini-batch on the way, the same on every rank.
        averaged: log-probs under an average of weights, [batch, response], of each micro-batch whose loss is still to
            be called, in the order of these calls.
    """

    decision: Any = None
    decide_in_loss: bool = False
    group: dist.ProcessGroup | None = None
    sums: list[MicroBatchSums] = field(default_factory=list)
    keep: Tensor | None = None
    weighs_responses: bool = False
    log_weights: list[Tensor] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    averaged: deque[Tensor] = field(default_factory=deque)


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


def decision_of(key: str, scope: str, search: Callable[[], Search[Decision]]) -> Decision:
    """The decision that holds for the micro-batch at hand.

    Args:
        key: Full name of the setting that gives `scope`, for messages.
        scope: One of `SCOPES`.
        search: Makes one that has seen this micro-batch; called where the decision is not there yet.

    Raises:
        RuntimeError: scope mini_batch, but nobody decided over the mini-batch.
    """
    if scope == "micro_batch":
        return search().solve()
    mini_batch = current_mini_batch()
    if mini_batch is not None and mini_batch.decide_in_loss:
        if mini_batch.decision is not None:
            raise RuntimeError("The loss was called twice for a mini-batch that the actor worker took for one piece.")
        mini_batch.decision = search().solve(mini_batch.group)
    if mini_batch is None or mini_batch.decision is None:
        raise RuntimeError(
            f"{key}=mini_batch needs the actor worker verl_m2po.actor.worker.M2POTrainingWorker, which decides "
            "over the whole optimizer mini-batch before verl splits it, but the loss was called without it. "
            f"{key}=micro_batch works with any actor worker: each micro-batch then decides for itself."
        )
    return mini_batch.decision


def averaged_log_prob(key: str) -> Tensor:
    """log-probs of the micro-batch at hand under the average of weights, [batch, response].

    Args:
        key: Full name of the setting that asks for the average, for messages.

    Raises:
        RuntimeError: Nobody has looked at it with the average.
    """
    mini_batch = current_mini_batch()
    if mini_batch is None or not mini_batch.averaged:
        raise RuntimeError(
            f"{key} needs the actor worker verl_m2po.actor.worker.M2POTrainingWorker, which averages the weights of "
            "past updates, but the loss was called without it. loss=decoupled_ppo has a proximal policy without it."
        )
    return mini_batch.averaged.popleft()
