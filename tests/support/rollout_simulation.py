"""A trainer and a rollout without tokens: drives a rule through random arrival, latency and failure."""

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

from verl_m2po.staleness.rule.records import Group, Row
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.worth import Outcome


@dataclass
class Workload:
    """How long things take; times in units of one trainer step, lengths in tokens.

    Args:
        length: draws the tokens of one response.
        tokens_per_time: speed of generation.
        fail_share: share of groups that end without a result.
        mask_share: share of responses, after the first of a group, that a masked copy of the first stands in for.
        train_time: of one trainer step.
        rows: responses of a group.
        overlaps: training and generation run side by side; otherwise the rollout sleeps while training runs.
    """

    length: object
    tokens_per_time: float = 100.0
    fail_share: float = 0.0
    mask_share: float = 0.0
    train_time: float = 1.0
    rows: int = 2
    overlaps: bool = True


@dataclass
class _Generating:
    uid: str
    lengths: list[int]
    spans: list[list[list[int]]]
    left: list[float]


@dataclass
class Trace:
    """What happened.

    Args:
        trained: (version at training, oldest trained version, group) of every trained group.
        dropped_lengths: mean response length of what was dropped or aborted.
    """

    trained: list[tuple[int, int | None, Group]] = field(default_factory=list)
    ended: Counter = field(default_factory=Counter)
    all_lengths: list[float] = field(default_factory=list)
    dropped_lengths: list[float] = field(default_factory=list)
    max_depth: int = 0
    max_in_flight: int = 0
    waited: float = 0.0


def outcome(uid: str) -> Outcome:
    """What training a group shows of it: an advantage in three of four, a success in half of those."""
    chance = random.Random(uid)
    has_advantage = chance.random() < 0.75
    has_success = has_advantage and chance.random() < 0.5
    return Outcome(chance.random(), has_advantage, has_success, has_score=has_success)


class Simulation:
    """One run. Generation of a token takes a fixed time; a weight update changes the version of the tokens after it."""

    def __init__(self, rule: StalenessRule, workload: Workload, seed: int, parts: int = 1) -> None:
        self.rule, self.workload, self.parts = rule, workload, parts
        self.random = random.Random(seed)
        self.now = 0.0
        self.version = 0
        self.trace = Trace()
        self._ends: list[tuple[float, int, str]] = []
        self._generating: dict[str, tuple[float, list[int], list[tuple[float, int]]]] = {}
        self.dispatched = 0
        self.dropped: set[str] = set()
        self._versions: list[tuple[float, int]] = [(0.0, 0)]

    def run(self, steps: int) -> Trace:
        self.rule.limit(steps)
        for step in range(1, steps + 1):
            self._train(step)
        return self.trace

    def _train(self, step: int) -> None:
        assert self.version == step - 1
        for _ in range(self.parts):
            self._wait_until(self._try_select)
        if not self.workload.overlaps:
            self._wait_until(lambda: self.rule.settled(self.version))
        self._run_for(self.workload.train_time)
        self._wait_until(lambda: self.rule.settled(self.version))
        self.version += 1
        self._versions.append((self.now, self.version))
        for uid in self.rule.expired(self.version):
            self._abort(uid)
        self._pump()

    def _pump(self) -> None:
        for _ in range(self.rule.admissible(self.version)):
            uid = f"g{self.dispatched}"
            self.dispatched += 1
            self.rule.admit(uid, self.version, self.dispatched - 1)
            lengths = [max(1, int(self.workload.length(self.random))) for _ in range(self.workload.rows)]
            self._generating[uid] = (self.now, lengths, [])
            self.trace.all_lengths.append(sum(lengths) / len(lengths))
            heapq.heappush(self._ends, (self.now + max(lengths) / self.workload.tokens_per_time, self.dispatched, uid))
        self.trace.max_depth = max(self.trace.max_depth, self.rule.depth)
        self.trace.max_in_flight = max(self.trace.max_in_flight, self.rule.in_flight)

    def _abort(self, uid: str) -> None:
        _, lengths, _ = self._generating.pop(uid)
        self.rule.fail(uid)
        self.trace.ended["aborted"] += 1
        self.trace.dropped_lengths.append(sum(lengths) / len(lengths))

    def _row(self, key: str, start: float, length: int) -> Row:
        """Cut the generation at the weight updates that fell into it."""
        speed = self.workload.tokens_per_time
        end = start + length / speed
        changes = []
        for moment, version in reversed(self._versions):
            changes.append((max(moment, start), version))
            if moment <= start:
                break
        changes.reverse()
        spans, done = [], 0
        for i, (_, version) in enumerate(changes):
            until = changes[i + 1][0] if i + 1 < len(changes) else end
            tokens = length - done if i + 1 == len(changes) else min(length, round((until - start) * speed)) - done
            if tokens > 0:
                spans.append((version, tokens))
                done += tokens
        return Row(key, 5, length, tuple(spans))

    def _end_next(self) -> None:
        end, _, uid = heapq.heappop(self._ends)
        self.now = max(self.now, end)
        if uid not in self._generating:
            return  # aborted
        start, lengths, _ = self._generating.pop(uid)
        if self.random.random() < self.workload.fail_share:
            self.rule.fail(uid)
            self.trace.ended["failed"] += 1
            return
        rows = [self._row(f"{uid}_{i}_0", start, length) for i, length in enumerate(lengths)]
        for i in range(1, len(rows)):
            if self.workload.mask_share and self.random.random() < self.workload.mask_share:
                rows[i] = rows[0].masked_as(rows[i].key)
        self.rule.finish(uid, tuple(rows))

    def _run_for(self, time: float) -> None:
        until = self.now + time
        while self._ends and self._ends[0][0] <= until:
            self._end_next()
        self.now = until

    def _wait_until(self, is_done) -> None:
        began = self.now
        self._pump()
        while not is_done():
            self._pump()
            assert self._ends, f"deadlock at version {self.version}: {self.rule.state_dict()}"
            self._end_next()
        self.trace.waited += self.now - began

    def _try_select(self) -> bool:
        count = self.rule.batch_size // self.parts
        selection = self.rule.select(self.version, count)
        if selection is None:
            return False
        for group in selection.evicted:
            self.trace.ended["dropped"] += 1
            self.dropped.add(group.ticket.uid)
            self.trace.dropped_lengths.append(group.tokens_per_response)
        if not selection.groups:
            return False
        assert len(selection.groups) == count
        if self.rule.needs_outcomes:
            self.rule.judge({group.ticket.uid: outcome(group.ticket.uid) for group in selection.groups})
        for group in selection.groups:
            self.trace.trained.append((self.version, selection.oldest_version, group))
        return True
