"""What is simulated: lengths of responses, speeds of servers and trainer, rates of failure. Plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np

SECONDS_PER_YEAR = 365.25 * 24 * 3600


class PlanError(ValueError):
    """Numbers that contradict each other, or a log without what is needed; says what to give instead."""


class Lengths(Protocol):
    """Draws response lengths, in tokens."""

    def draw(self, rng: np.random.Generator, groups: int, responses: int, version: int) -> list[list[int]]:
        """The lengths of so many groups that start with weight `version`, each length at least 1."""
        ...


class QuantileLengths:
    """Lengths between given quantiles, interpolated in the logarithm.

    Args:
        quantiles: share -> tokens, such as {0.5: 900, 0.9: 3000}.
        longest: tokens; the limit on a response, and the quantile 1 where none is given.

    Raises:
        PlanError: shares outside 0 to 1, lengths that fall, or one above `longest`.
    """

    def __init__(self, quantiles: dict[float, float], longest: int) -> None:
        if not quantiles:
            raise PlanError("no response length is known; give --lengths, such as --lengths 0.5:900,0.9:3000")
        points = sorted(quantiles.items())
        for share, tokens in points:
            if not 0 <= share <= 1 or not math.isfinite(tokens) or tokens < 1:
                raise PlanError(f"--lengths {share:g}:{tokens:g}: a share from 0 to 1, and tokens of at least 1")
            if tokens > longest:
                raise PlanError(
                    f"--lengths {share:g}:{tokens:g} is above --max-length {longest}; lower one, or raise it"
                )
        if any(a[1] > b[1] for a, b in pairwise(points)):
            raise PlanError(f"--lengths {points}: a larger share must not have a shorter length")
        if points[0][0] > 0:
            points.insert(0, (0.0, max(1.0, points[0][1] ** 2 / (points[-1][1] if points[-1][0] > 0.5 else longest))))
        if points[-1][0] < 1:
            points.append((1.0, float(longest)))
        self._shares = [share for share, _ in points]
        self._logs = [math.log(tokens) for _, tokens in points]

    def draw(self, rng: np.random.Generator, groups: int, responses: int, version: int) -> list[list[int]]:
        """The lengths of so many groups; the weight version makes no difference."""
        logs = np.interp(rng.random((groups, responses)), self._shares, self._logs)
        return np.exp(logs).round().astype(int).tolist()


class MeasuredLengths:
    """Whole groups as they were measured: long answers come in groups, and their number per group is kept.

    Args:
        groups: the response lengths of each measured group, in tokens.
    """

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = [list(group) for group in groups if len(group)]
        if not self._groups:
            raise PlanError("no response length is known; give --lengths, such as --lengths 0.5:900,0.9:3000")

    @property
    def longest(self) -> int:
        """Of all measured responses, tokens."""
        return max(max(group) for group in self._groups)

    def draw(self, rng: np.random.Generator, groups: int, responses: int, version: int) -> list[list[int]]:
        """The lengths of so many groups as they were measured; the weight version makes no difference."""
        return [self._one(rng, self._groups[i], responses) for i in rng.integers(len(self._groups), size=groups)]

    @staticmethod
    def _one(rng: np.random.Generator, group: list[int], responses: int) -> list[int]:
        return group if len(group) == responses else [group[i] for i in rng.integers(len(group), size=responses)]


@dataclass(frozen=True)
class EngineCurve:
    """Tokens per second of one server by the number of requests that it decodes at once; linear between the points.

    Below the first point every request is as fast as there; beyond the last the sum stays.

    Args:
        points: (requests, tokens/s of the server), both positive, requests rising.
        max_requests: more wait in the server's queue; verl's `rollout.max_num_seqs`.
    """

    points: tuple[tuple[int, float], ...]
    max_requests: int

    def __post_init__(self) -> None:
        if not self.points or self.max_requests < 1:
            raise PlanError("the speed of a server is not known; give --tokens-per-s, such as --tokens-per-s 64:2500")
        for requests, speed in self.points:
            if requests < 1 or not math.isfinite(speed) or speed <= 0:
                raise PlanError(f"--tokens-per-s {requests}:{speed:g}: requests from 1, and a positive speed")
        if any(a[0] >= b[0] for a, b in pairwise(self.points)):
            raise PlanError(f"--tokens-per-s {self.points}: the same number of requests is given twice")

    def server_tokens_per_s(self, requests: int) -> float:
        """Of all `requests` together."""
        first, speed = self.points[0]
        if requests <= first:
            return speed * requests / first
        counts, speeds = zip(*self.points, strict=True)
        return float(np.interp(requests, counts, speeds))

    def request_tokens_per_s(self) -> list[float]:
        """Speed of one request, by how many are decoded at once, from 0 to `max_requests`."""
        return [0.0, *(self.server_tokens_per_s(n) / n for n in range(1, self.max_requests + 1))]

    @property
    def peak_tokens_per_s(self) -> float:
        """Tokens per second of one server at the best number of requests."""
        return max(self.server_tokens_per_s(min(n, self.max_requests)) for n in (*dict(self.points), self.max_requests))


@dataclass(frozen=True)
class Generation:
    """The servers.

    Args:
        servers: how many.
        curve: of one of them.
        start_s: from a request's arrival to its first token.
        prefill_tokens_per_s: of one server, when interrupted requests are read in again after a push; inf: at once.
        speed_spread: standard deviation of the logarithm of the servers' speeds; 0: all alike.
        queue_delays_push: a push waits until all that was sent has begun, or a minute: verl 0.9.1 without the patch
            `hand_back_what_waits`.
    """

    servers: int
    curve: EngineCurve
    start_s: float = 0.0
    prefill_tokens_per_s: float = math.inf
    speed_spread: float = 0.0
    queue_delays_push: bool = False


@dataclass(frozen=True)
class Training:
    """The trainer, and what surrounds an update.

    Args:
        step_s: seconds of a trainer step that do not depend on its tokens: updates, log-probs, rewards, handing over.
        per_token_s: what each token of the batch adds, in seconds.
        push_s: one transfer of the weights; where devices are shared, switching them over and back included.
        devices: of the trainer; only their slowest counts, see `spread`.
        spread: standard deviation of the logarithm of a device's speed in a step; 0: all alike.
    """

    step_s: float
    per_token_s: float = 0.0
    push_s: float = 0.0
    devices: int = 1
    spread: float = 0.0


@dataclass(frozen=True)
class Failures:
    """What breaks, and what that costs; all rates 0: nothing.

    Args:
        server_per_s: failures of one server per second.
        trainer_per_s: failures of the trainer, all its devices together, per second.
        heals: a lost server's requests start again on others while the run goes on, and another one takes its place;
            otherwise its death ends the run, which restarts as after one of the trainer. Not on shared devices.
        replace_s: from the death of a server until another one serves in its place.
        restart_s: from the end of a run until it trains again, without the steps that are repeated.
        checkpoint_steps: trainer steps from one checkpoint to the next; half of them are repeated on average.
        group_share: share of prompt groups that end without a result, and are replaced.
    """

    server_per_s: float = 0.0
    trainer_per_s: float = 0.0
    heals: bool = False
    replace_s: float = 600.0
    restart_s: float = 600.0
    checkpoint_steps: int = 20
    group_share: float = 0.0


@dataclass(frozen=True)
class Workload:
    """One run, whatever its mode.

    Args:
        groups: prompts of a trainer step, `data.train_batch_size`.
        responses: of a prompt, `rollout.n`.
        prompt_tokens: of a prompt, mean.
        lengths: of the responses.
        generation: the servers.
        training: the trainer.
        failures: of both.
    """

    groups: int
    responses: int
    lengths: Lengths
    generation: Generation
    training: Training
    prompt_tokens: int = 0
    failures: Failures = field(default_factory=Failures)

    def __post_init__(self) -> None:
        counts = {"groups": self.groups, "responses": self.responses, "servers": self.generation.servers}
        for name, value in counts.items():
            if value < 1:
                raise PlanError(f"{name} is {value}; it must be at least 1")
        training = self.training
        times = {"step": training.step_s, "token": training.per_token_s, "push": training.push_s}
        for name, value in times.items():
            if not value >= 0 or math.isinf(value):
                raise PlanError(f"seconds of a {name} are {value}; they must be 0 or more")
