"""One run of one mode: the rule decides, the fleet generates, and time passes as `trainer.py` lets it.

What a mode adds to its rule is when it waits, and what stands still meanwhile; that is `_Simulation.step`, which
follows `PPOTrainerStaleK` and its siblings line by line.
"""

import heapq
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from verl_m2po.planner.account import Account, Outcome
from verl_m2po.planner.fleet import Fleet
from verl_m2po.planner.setting import Setting
from verl_m2po.planner.workload import SECONDS_PER_YEAR, PlanError, Workload
from verl_m2po.staleness.rule.records import Group, Row

_NEVER = math.inf
MOST_QUEUEING_S = 60.0
"""`_GATE_BARRIER_TIMEOUT_S` of verl's `vllm_async_server`."""
LONGEST_S = 1000 * SECONDS_PER_YEAR
"""Nobody waits so long: a run that restarts more often than it gets on would take for ever."""
GATHERED_SHARE = 5e-3
"""Of the requests in flight: fewer that replace evicted groups start together, in the mode that waits for no group."""


class Deadlock(RuntimeError):
    """The rule waits for a group that nobody generates."""


class _Simulation:
    def __init__(self, setting: Setting, workload: Workload, seed: int, total_steps: int | None) -> None:
        self.setting, self.workload = setting, workload
        self.rule = setting.rule(workload.groups, seed)
        if total_steps is not None:
            self.rule.limit(total_steps)
        self.fleet = Fleet(workload.generation, seed, GATHERED_SHARE if setting.mode == "bounded_async" else 0.0)
        self.account = Account(workload)
        self.version = 0
        self._wall_ahead_s = 0.0  # how long the fleet has stood still
        self._lengths_rng = np.random.default_rng([seed, 2])
        self._luck = np.random.default_rng([seed, 3])
        self._dispatched = 0
        self._breakages: list[tuple[float, int, int]] = []  # (fleet's time, server, 0 it dies or 1 it joins)
        self._step_s: list[float] = []
        rate = workload.failures.server_per_s
        # Where the devices are shared, a server dies with the trainer's worker.
        self._heals = workload.failures.heals and not setting.is_shared
        if rate and self._heals:
            lives = self._luck.exponential(1 / rate, workload.generation.servers)
            self._breakages = [(at, server, 0) for server, at in enumerate(lives.tolist())]
            heapq.heapify(self._breakages)

    @property
    def wall(self) -> float:
        """Seconds since the run began."""
        return self.fleet.now + self._wall_ahead_s

    def _freeze(self, seconds: float) -> None:
        """Time passes, and no token is generated."""
        self._wall_ahead_s += seconds

    def begin(self) -> None:
        self._pump()

    def step(self) -> None:
        """One trainer step, as `PPOTrainerStaleK` or one of its siblings on devices of its own takes it."""
        began = self.wall
        waited = self._wait_until(lambda: self.rule.settled(self.version)) if self.setting.is_shared else 0.0
        tokens, more = self._sample()
        waited += more
        training_s = self._training_s(tokens)
        if self.setting.is_shared:
            self._freeze(training_s)
        else:
            self._run_for(training_s)
            waited += self._wait_until(lambda: self.rule.settled(self.version))
            if self.workload.generation.queue_delays_push:
                self._empty_queues()
        self._freeze(self.workload.training.push_s)
        self._restart_if_broken(self.wall - began)
        self._new_weights()
        self._step_s.append(self.wall - began)
        self.account.step(self.wall - began, waited, training_s, self.fleet, self.rule)

    def _empty_queues(self) -> None:
        """As verl's servers without our patch: what has been sent must have begun, or a minute be over."""
        seconds = min(self.fleet.all_begun_at - self.fleet.now, MOST_QUEUEING_S)
        if seconds > 0:
            self._run_for(seconds)

    def _training_s(self, tokens: int) -> float:
        training = self.workload.training
        seconds = training.step_s + training.per_token_s * tokens
        if training.spread and training.devices > 1:
            # The slowest of `devices`: the largest of so many normal numbers, drawn at once.
            largest = NormalDist().inv_cdf((1 - self._luck.random()) ** (1 / training.devices))
            seconds *= math.exp(training.spread * largest)
        return seconds

    def _new_weights(self) -> None:
        self.version += 1
        tickets = self.rule.in_flight_tickets()
        self.fleet.new_weights(self.version, tickets[0].dispatch_version if tickets else self.version)
        if expired := self.rule.expired(self.version):
            lost = self.fleet.drop([int(uid) for uid in expired])
            for uid in expired:
                self.rule.fail(uid)
            self.account.aborted(len(expired), lost)
        self._pump()

    def _pump(self) -> None:
        count = self.rule.admissible(self.version)
        if not count:
            return
        lengths = self.workload.lengths.draw(self._lengths_rng, count, self.workload.responses, self.version)
        for each in lengths:
            number = self._dispatched
            self._dispatched += 1
            self.rule.admit(str(number), self.version, number)
            self.fleet.start(number, each)

    def _finish(self, group: int, tokens: dict[int, int]) -> None:
        uid, share, generated = str(group), self.workload.failures.group_share, sum(tokens.values())
        if share and self._luck.random() < share:
            self.rule.fail(uid)
            self.account.failed(generated)
            return
        # One row for all responses: the rules look at tokens by version, summed over a group.
        self.rule.finish(uid, (Row(uid, self.workload.prompt_tokens, generated, tuple(tokens.items())),))

    def _wait_until(self, is_done: Callable[[], bool]) -> float:
        """As the buffer waits: it takes what has come, starts what the rule admits, and asks again; seconds waited."""
        began = self.wall
        self._pump()
        while not is_done():
            self._pump()
            self._next(_NEVER)
        return self.wall - began

    def _next(self, until: float) -> None:
        """Let time pass until a group is whole, a server breaks or comes back, or `until` comes."""
        breaks = self._breakages[0][0] if self._breakages else _NEVER
        if until == breaks == self.fleet.next_at():
            raise Deadlock(f"{self.rule.name} at weight version {self.version} waits, and nothing is in flight")
        for group, tokens in self.fleet.run(min(until, breaks)):
            self._finish(group, tokens)
        if breaks <= until and self.fleet.now >= breaks:
            self._break_or_join()

    def _break_or_join(self) -> None:
        at, server, is_join = heapq.heappop(self._breakages)
        failures = self.workload.failures
        if is_join:
            self.fleet.join(server)
            heapq.heappush(self._breakages, (at + self._luck.exponential(1 / failures.server_per_s), server, 0))
        else:
            self.fleet.fail(server)
            self.account.server_failures += 1
            heapq.heappush(self._breakages, (at + failures.replace_s, server, 1))

    def _run_for(self, seconds: float) -> None:
        until = self.fleet.now + seconds
        while self.fleet.now < until:
            self._next(until)

    def _sample(self) -> tuple[int, float]:
        """Wait for the batch, and take it; its tokens, and the seconds waited."""
        chosen: list[Group] = []

        def try_select() -> bool:
            selection = self.rule.select(self.version, self.workload.groups)
            if selection is None:
                return False
            self.account.dropped(selection.evicted)
            chosen.extend(selection.groups)
            if selection.groups:
                self.account.trained(selection, self.version)
            return bool(selection.groups)

        waited = self._wait_until(try_select)
        return sum(group.generated_tokens for group in chosen), waited

    def _restart_if_broken(self, elapsed_s: float) -> None:
        failures = self.workload.failures
        rate = failures.trainer_per_s
        if not self._heals:
            rate += failures.server_per_s * self.workload.generation.servers
        for _ in range(self._luck.poisson(rate * elapsed_s) if rate else 0):
            repeated = float(np.mean(self._step_s)) * failures.checkpoint_steps / 2 if self._step_s else 0.0
            self._freeze(failures.restart_s + repeated)
            self.account.restarted(failures.restart_s + repeated)
            self.fleet.restart()
            if self.wall > LONGEST_S:
                raise PlanError(
                    f"--failures-per-device-year: {self.setting.mode} restarts every {1 / rate:.3g} s and repeats more "
                    f"than it trains until then; lower it, or --checkpoint-steps {failures.checkpoint_steps}"
                )


def simulate(
    setting: Setting,
    workload: Workload,
    steps: int = 50,
    seed: int = 0,
    warm_up: int | None = None,
    run_steps: int | None = None,
) -> Outcome:
    """Simulate `steps` trainer steps in the steady state.

    Args:
        setting: mode, staleness and replay.
        workload: everything that is not chosen.
        steps: trainer steps that count.
        seed: of everything random; the same seed gives the same numbers.
        warm_up: trainer steps before them; None: enough that no rollout of the beginning is left.
        run_steps: trainer steps of the whole run, after which nothing is trained; None: it goes on.

    Raises:
        PlanError: numbers that contradict each other.
    """
    if steps < 1:
        raise PlanError(f"--simulate-steps {steps}: at least one trainer step must count")
    warm_up = setting.staleness_steps + 2 if warm_up is None else warm_up
    simulation = _Simulation(setting, workload, seed, run_steps)
    simulation.begin()
    for i in range(warm_up + steps):
        if i == warm_up:
            simulation.account.start_counting(simulation.fleet, simulation.wall)
        simulation.step()
    return simulation.account.outcome(setting.staleness_steps, simulation.wall)


def run_s(setting: Setting, workload: Workload, run_steps: int, mean_step_s: float, seed: int = 0) -> float:
    """Seconds of a whole run of `run_steps` trainer steps.

    Simulated are its beginning and its end, at which nothing is generated for later steps. In a long run steps of
    `mean_step_s` seconds, those of the steady state, lie between.
    """
    simulated = min(run_steps, 2 * (setting.staleness_steps + 1))
    edges = simulate(setting, workload, simulated, seed, warm_up=0, run_steps=simulated)
    return sum(edges.step_s) + (run_steps - simulated) * mean_step_s
