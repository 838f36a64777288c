"""Time and memory of one call of a loss, forward and backward."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, FSDPActorConfig

from benchmarks.authors_loop import authors_loss
from benchmarks.batches import Batch
from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.losses.kernel import diagnostics
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.tokens import tokens_of
from verl_m2po.second_moment import TrustRegionSearch


@dataclass(frozen=True)
class Contestant:
    """One way to compute a loss.

    Args:
        name: Heading of its column.
        loss: verl's registered name, or the function.
        scope: `policy_loss.m2po.scope`; with "mini_batch" the decision is made before the clock starts.
        aggregation: `loss_agg_mode`.
        most_tokens: Larger batches are left out.
    """

    name: str
    loss: str | Callable
    scope: str = "micro_batch"
    aggregation: str = "token-mean"
    most_tokens: float = float("inf")


CONTESTANTS = (
    Contestant("vanilla", "vanilla"),
    Contestant("gspo", "gspo", aggregation="seq-mean-token-mean"),
    Contestant("m2po, given threshold", "m2po", scope="mini_batch"),
    Contestant("m2po, micro_batch", "m2po"),
    Contestant("m2po_clip", "m2po_clip"),
    Contestant("authors' loop", authors_loss, most_tokens=300_000),
)

CALLS_A_TURN = 3


class Call:
    """One contestant on one batch, ready to be called again and again."""

    def __init__(self, contestant: Contestant, batch: Batch):
        self.contestant = contestant
        self.batch = batch
        self.config = _actor_config(contestant, batch)
        loss = contestant.loss
        self.loss: Callable[..., Any] = get_policy_loss_fn(loss) if isinstance(loss, str) else loss
        tokens = tokens_of(batch.log_prob, batch.old_log_prob, batch.advantages, batch.response_mask)
        search = TrustRegionSearch(batch.threshold)
        search.add(tokens.magnitude)
        self.region = search.solve()

    def __call__(self) -> None:
        log_prob = self.batch.log_prob.detach().requires_grad_()
        # Our actor worker collects the statistics; under verl's own each loss turns them into numbers.
        given = self.contestant.scope == "mini_batch"
        with training(MiniBatch(decision=self.region if given else None)) as mini_batch:
            loss, _ = self.loss(
                old_log_prob=self.batch.old_log_prob,
                log_prob=log_prob,
                advantages=self.batch.advantages,
                response_mask=self.batch.response_mask,
                loss_agg_mode=self.contestant.aggregation,
                config=self.config,
                rollout_is_weights=None,
            )
        loss.backward()
        if mini_batch.sums:
            diagnostics.added_up(mini_batch.sums).tolist()


class Timed(Protocol):
    """What can be measured: a call, and the batch that says on which device it works."""

    batch: Batch

    def __call__(self) -> None: ...


def seconds(calls: Sequence[Timed], rounds: int) -> list[list[float]]:
    """Times of each call, `CALLS_A_TURN` in a row and in turns, so that all see the same machine.

    The first round is not counted. On the CPU it is the time that the processor worked for this process, which a busy
    machine does not distort.
    """
    clock = time.perf_counter if calls[0].batch.log_prob.is_cuda else time.process_time
    times: list[list[float]] = [[] for _ in calls]
    gc.disable()
    try:
        for turn in range(rounds + 1):
            for call, taken in zip(calls, times, strict=True):
                for _ in range(CALLS_A_TURN):
                    _synchronize(call.batch)
                    start = clock()
                    call()
                    _synchronize(call.batch)
                    if turn:
                        taken.append(clock() - start)
    finally:
        gc.enable()
    return times


def median(times: list[float]) -> float:
    """The median time, in seconds."""
    return statistics.median(times)


def peak_tensors(call: Call) -> float:
    """Most memory that one call holds beyond its arguments, in tensors of the size of the log-probs in float32."""
    unit = call.batch.log_prob.numel() * 4
    if call.batch.log_prob.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / unit
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / unit


def _actor_config(contestant: Contestant, batch: Batch) -> ActorConfig:
    policy_loss = M2POPolicyLossConfig(
        m2po={"threshold": batch.threshold, "scope": contestant.scope}, m2po_clip={"threshold": batch.threshold}
    )
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy_loss)
    response_tokens = int(batch.response_mask.sum())
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=response_tokens, global_batch_size=batch.log_prob.shape[0]
    )
    return config


def _synchronize(batch: Batch) -> None:
    if batch.log_prob.is_cuda:
        torch.cuda.synchronize()
