"""What the buffer tells the logger: `staleness/*`, once per trainer step.

verl reduces metrics by name, so no name here contains "min", "max", "sum" or "total" unless it is one.
"""

import time
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.records import Group, GroupReport, Row
from verl_m2po.staleness.rule.units import UpdateClock, UpdateCount

AGE_BUCKETS_STEPS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Upper ends of the age histogram, in trainer steps; what is older is counted as `steps_over_128`."""

DECILES = 10


class LengthBias:
    """Whether long answers are dropped more often: drop rate by decile of the response length.

    Args:
        window: how many of the last ended groups are looked at.
    """

    def __init__(self, window: int = 1000) -> None:
        self._groups: deque[tuple[float, bool]] = deque(maxlen=window)

    def add(self, tokens_per_response: float, was_dropped: bool) -> None:
        """A group has ended; its mean response was that many tokens long."""
        self._groups.append((tokens_per_response, was_dropped))

    def drop_rates(self) -> list[float]:
        """Share of dropped groups in each tenth of the window, from the shortest answers to the longest.

        Empty if nothing was dropped, or too little has ended to be divided.
        """
        ordered = sorted(self._groups)
        if len(ordered) < DECILES or not any(was_dropped for _, was_dropped in ordered):
            return []
        ends = [len(ordered) * i // DECILES for i in range(DECILES + 1)]
        tenths = [ordered[a:b] for a, b in pairwise(ends)]
        return [sum(was_dropped for _, was_dropped in tenth) / len(tenth) for tenth in tenths]

    def state_dict(self) -> list[list[Any]]:
        """The window, as plain JSON."""
        return [list(group) for group in self._groups]

    def load_state_dict(self, state: list[list[Any]]) -> None:
        """Put back what `state_dict` returned."""
        self._groups.extend((length, was_dropped) for length, was_dropped in state)


@dataclass
class _Step:
    admitted: int = 0
    failed: int = 0
    aborted: int = 0
    dropped: int = 0
    set_aside: Counter[float] = field(default_factory=Counter)
    masked_trajectories: int = 0
    moved: int = 0
    poisoned: int = 0
    lost_generation_s: float = 0.0
    replayed: int = 0
    rows: int = 0
    spans: int = 0
    tokens: int = 0
    over_age_tokens: int = 0
    age_by_steps: Counter[int] = field(default_factory=Counter)
    age_by_updates: Counter[int] = field(default_factory=Counter)
    trainer_idle_s: float = 0.0
    generator_idle_s: float = 0.0
    began_at: float = field(default_factory=time.time)


class StalenessMetrics:
    """Collects what happens during a trainer step.

    Args:
        clock: converts trainer steps to optimizer updates.
        updates: counts those that each step really made; None: what the clock says.
    """

    def __init__(self, clock: UpdateClock, updates: UpdateCount | None = None) -> None:
        self.clock = clock
        self._updates = UpdateCount(clock) if updates is None else updates
        self._step = _Step()
        self._length_bias = LengthBias()
        self._generator_idle_since: float | None = None

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`."""
        if isinstance(event, events.Finished | events.Failed | events.Lost | events.SetAside):
            self.moved(event.report)
        match event:
            case events.Began():
                self.begin()
            case events.Dispatched(tickets):
                self.admitted(len(tickets))
            case events.Finished(_, report):
                self.masked(len(report.masked_errors))
            case events.Failed(_, report) if report.was_aborted:
                self.aborted(report.generated_tokens / report.responses)
            case events.Failed(_, report):
                self._step.poisoned += report.deaths > 0
                self.failed()
            case events.SetAside(_, report):
                self.masked(len(report.masked_errors))
                self.set_aside(report.shared_metric)
            case events.Evicted(groups):
                for group in groups:
                    self.dropped(group)
            case events.Trained(_, version, selection):
                self.trained(selection.groups, version, selection.oldest_version, len(selection.replayed))
            case events.TrainerWaited(seconds):
                self.trainer_waited(seconds)
            case events.GeneratorIdle(since):
                self.generator_idle(since)

    def begin(self) -> None:
        """Training begins now; what came before, like starting the rollout servers, is no step's time."""
        self._step.began_at = time.time()
        self._step.generator_idle_s = 0.0

    def admitted(self, groups: int) -> None:
        """That many groups were started."""
        self._step.admitted += groups
        if self._generator_idle_since is not None:
            self._step.generator_idle_s += max(0.0, time.time() - self._generator_idle_since)
            self._generator_idle_since = None

    def generator_idle(self, since: float) -> None:
        """Nothing is in flight since `since`, seconds since the epoch."""
        self._generator_idle_since = since

    def trainer_waited(self, seconds: float) -> None:
        """The trainer had no batch for that many seconds."""
        self._step.trainer_idle_s += seconds

    @property
    def waiting_share(self) -> float:
        """Share of the present step, so far, in which the trainer waited."""
        elapsed = time.time() - self._step.began_at
        return min(1.0, self._step.trainer_idle_s / elapsed) if elapsed > 0 else 0.0

    def failed(self) -> None:
        """A group failed and is replaced."""
        self._step.failed += 1

    def moved(self, report: GroupReport) -> None:
        """A group has ended, or was given up; servers may have died under it."""
        self._step.moved += report.moves > 0
        self._step.lost_generation_s += report.lost_s

    def set_aside(self, shared_metric: float | None) -> None:
        """A group has no advantage and is replaced: all its trajectories have this value."""
        assert shared_metric is not None
        self._step.set_aside[shared_metric] += 1

    @property
    def set_aside_by_value(self) -> dict[float, int]:
        """Groups of this step without advantage, by the value that all their trajectories have."""
        return dict(self._step.set_aside)

    def masked(self, trajectories: int) -> None:
        """That many trajectories of a group that is kept failed."""
        self._step.masked_trajectories += trajectories

    def aborted(self, tokens_per_response: float) -> None:
        """A group was aborted as too old, after that many tokens a response."""
        self._step.aborted += 1
        self._length_bias.add(tokens_per_response, was_dropped=True)

    def dropped(self, group: Group) -> None:
        """A finished group is too old to be trained."""
        self._step.dropped += 1
        self._length_bias.add(group.tokens_per_response, was_dropped=True)

    def trained(self, groups: tuple[Group, ...], version: int, oldest_version: int | None, replayed: int = 0) -> None:
        """These groups are trained from weight `version`; tokens older than `oldest_version` are masked.

        Args:
            replayed: how many of them were trained before.
        """
        self._step.replayed += replayed
        for group in groups:
            self._length_bias.add(group.tokens_per_response, was_dropped=False)
            for row in group.rows:
                if not row.is_masked:
                    self._trained_row(row, version, oldest_version)

    def _trained_row(self, row: Row, version: int, oldest_version: int | None) -> None:
        self._step.rows += 1
        self._step.spans += len(row.spans)
        for span_version, tokens in row.spans:
            if oldest_version is not None and span_version < oldest_version:
                self._step.over_age_tokens += tokens
            else:
                self._step.tokens += tokens
                self._step.age_by_steps[version - span_version] += tokens
                self._step.age_by_updates[self._updates.between(span_version, version)] += tokens

    def state_dict(self) -> dict[str, Any]:
        """What outlives a step, as plain JSON."""
        return {"length_bias": self._length_bias.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._length_bias.load_state_dict(state["length_bias"])

    def _histogram(self) -> dict[str, float]:
        tokens: Counter[str] = Counter()
        for age, count in self._step.age_by_steps.items():
            bucket = bisect_left(AGE_BUCKETS_STEPS, age)
            is_over = bucket == len(AGE_BUCKETS_STEPS)
            tokens[f"over_{AGE_BUCKETS_STEPS[-1]}" if is_over else f"to_{AGE_BUCKETS_STEPS[bucket]}"] += count
        return {f"staleness/age_share/steps_{name}": n / self._step.tokens for name, n in tokens.items()}

    def take(self, in_flight: int, ready: int) -> dict[str, float]:
        """The metrics of the step that ends now; counting starts again."""
        step, elapsed = self._step, time.time() - self._step.began_at
        uninformative = step.set_aside.total()
        metrics = {
            "staleness/depth": in_flight + ready,
            "staleness/waiting": ready,
            "staleness/in_flight": in_flight,
            "staleness/admitted": step.admitted,
            "staleness/evicted": step.failed + step.aborted + step.dropped + uninformative,
            "staleness/evicted_failed": step.failed,
            "staleness/evicted_aborted": step.aborted,
            "staleness/evicted_dropped": step.dropped,
            "staleness/evicted_uninformative": uninformative,
            "staleness/masked_trajectories": step.masked_trajectories,
            "staleness/groups_moved": step.moved,
            "staleness/lost_generation_s": step.lost_generation_s,
            "staleness/poisoned": step.poisoned,
            "staleness/replayed": step.replayed,
            "staleness/trained_tokens": step.tokens,
            "staleness/over_age_tokens": step.over_age_tokens,
            "staleness/trainer_idle_s": step.trainer_idle_s,
            "staleness/generator_idle_s": step.generator_idle_s,
            "staleness/tokens_per_s": step.tokens / elapsed if elapsed > 0 else 0.0,
        }
        if uninformative:
            metrics["training/filter_groups/evicted_samples"] = uninformative  # verl's own name
        if step.rows:
            metrics["staleness/spans_mean"] = step.spans / step.rows
        if step.tokens:
            ages = step.age_by_updates
            metrics["staleness/age_updates_mean"] = sum(age * n for age, n in ages.items()) / step.tokens
            metrics["staleness/age_updates_max"] = max(ages)
            metrics |= self._histogram()
        rates = self._length_bias.drop_rates()
        metrics |= {f"staleness/drop_rate/length_decile_{i}": rate for i, rate in enumerate(rates, start=1)}
        self._step = _Step()
        return metrics
