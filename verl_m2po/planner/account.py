"""What a simulated run has cost and learned from."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from verl_m2po.planner.fleet import Fleet
from verl_m2po.planner.workload import Workload
from verl_m2po.staleness.rule.records import Group, Selection
from verl_m2po.staleness.rule.rules import StalenessRule


@dataclass(frozen=True)
class Outcome:
    """The steady state of one setting; times in seconds, ages in trainer steps, shares from 0 to 1.

    Args:
        step_s: of each counted trainer step.
        ramp_s: from the start to the first counted step.
        trainer_idle: share of the time in which the trainer waits for rollouts.
        servers_idle: share of the servers' time without any request.
        servers_speed: tokens generated, as a share of what the servers could at their best.
        age_tokens: age -> trained tokens.
        trained_tokens: kept by the rule; one that is trained again counts again.
        replayed_tokens: those of them that were trained before.
        masked_tokens: over the bound, in groups that were trained.
        dropped_tokens: of groups that were evicted, aborted or failed.
        trained_groups: prompt groups; one that is trained again counts again.
        replayed_groups: those of them that were trained before.
        deepest: prompt groups admitted and not yet trained, at most.
        server_failures: healed.
        restarts: of the whole run.
        lost_s: to restarts.
    """

    step_s: tuple[float, ...]
    ramp_s: float
    trainer_idle: float
    servers_idle: float
    servers_speed: float
    age_tokens: dict[int, int]
    trained_tokens: int
    replayed_tokens: int
    masked_tokens: int
    dropped_tokens: int
    trained_groups: int
    replayed_groups: int
    deepest: int
    server_failures: int
    restarts: int
    lost_s: float

    @property
    def mean_step_s(self) -> float:
        """Mean seconds of a trainer step."""
        return float(np.mean(self.step_s))

    @property
    def p95_step_s(self) -> float:
        """Seconds that 95% of the trainer steps stay below."""
        return float(np.quantile(self.step_s, 0.95))

    @property
    def mean_age(self) -> float:
        """Of a trained token, in trainer steps."""
        return sum(age * tokens for age, tokens in self.age_tokens.items()) / max(1, self.trained_tokens)

    @property
    def largest_age(self) -> int:
        """Age of the oldest trained token, in trainer steps; 0 if nothing was trained."""
        return max(self.age_tokens, default=0)

    @property
    def wasted_share(self) -> float:
        """Share of the generated tokens that were masked or dropped."""
        lost = self.masked_tokens + self.dropped_tokens
        return lost / max(1, lost + self.trained_tokens - self.replayed_tokens)

    @property
    def replayed_share(self) -> float:
        """Share of the trained prompt groups that had been trained before."""
        return self.replayed_groups / max(1, self.trained_groups)

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens."""
        return self.trained_tokens / sum(self.step_s)


class Account:
    """Counts; nothing before `start_counting` is in the outcome."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.deepest = 0
        self.server_failures = 0
        self._clear()
        self._began_s = 0.0
        self._busy_s = self._tokens = 0.0

    def _clear(self) -> None:
        self._step_s: list[float] = []
        self._waited_s = 0.0
        self._ages: Counter[int] = Counter()
        self._masked = self._dropped = self._groups = self._restarts = 0
        self._replayed_tokens = self._replayed_groups = 0
        self._lost_s = 0.0
        self.server_failures = 0

    def start_counting(self, fleet: Fleet, wall_s: float) -> None:
        """The counted part begins."""
        self._clear()
        self._began_s, self._busy_s, self._tokens = wall_s, fleet.busy_s, fleet.generated_tokens

    def step(self, seconds: float, waited_s: float, training_s: float, fleet: Fleet, rule: StalenessRule) -> None:
        """A trainer step has ended."""
        self._step_s.append(seconds)
        self._waited_s += waited_s
        self.deepest = max(self.deepest, rule.depth)
        self._fleet = fleet

    def trained(self, selection: Selection, version: int) -> None:
        """A batch is trained from weight `version`."""
        self._groups += len(selection.groups)
        self._replayed_groups += len(selection.replayed)
        for group in selection.groups:
            if group.ticket.uid in selection.replayed:
                # All its tokens: a group with one over the bound is not trained again.
                self._replayed_tokens += group.generated_tokens
            for row in group.rows:
                for span_version, tokens in row.spans:
                    if selection.oldest_version is not None and span_version < selection.oldest_version:
                        self._masked += tokens
                    else:
                        self._ages[version - span_version] += tokens

    def dropped(self, groups: tuple[Group, ...]) -> None:
        """Finished groups that will never be trained."""
        self._dropped += sum(group.generated_tokens for group in groups)

    def aborted(self, groups: int, tokens: int) -> None:
        """Groups in flight were given up."""
        self._dropped += tokens

    def failed(self, tokens: int) -> None:
        """A group came to nothing."""
        self._dropped += tokens

    def restarted(self, seconds: float) -> None:
        """The run died and was started again."""
        self._restarts += 1
        self._lost_s += seconds

    def outcome(self, staleness_steps: int, wall_s: float) -> Outcome:
        """Of what was counted."""
        elapsed, servers = wall_s - self._began_s, self._workload.generation.servers
        possible = elapsed * servers * self._workload.generation.curve.peak_tokens_per_s
        return Outcome(
            step_s=tuple(self._step_s),
            ramp_s=self._began_s,
            trainer_idle=self._waited_s / elapsed if elapsed else 0.0,
            servers_idle=max(0.0, 1 - (self._fleet.busy_s - self._busy_s) / (elapsed * servers)) if elapsed else 0.0,
            servers_speed=(self._fleet.generated_tokens - self._tokens) / possible if possible else 0.0,
            age_tokens=dict(sorted(self._ages.items())),
            trained_tokens=sum(self._ages.values()),
            replayed_tokens=self._replayed_tokens,
            masked_tokens=self._masked,
            dropped_tokens=self._dropped,
            trained_groups=self._groups,
            replayed_groups=self._replayed_groups,
            deepest=self.deepest,
            server_failures=self.server_failures,
            restarts=self._restarts,
            lost_s=self._lost_s,
        )
