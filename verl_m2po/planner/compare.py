"""Every mode, split and staleness that was asked for, simulated; which of them is best, and why."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from verl_m2po.planner.account import Outcome
from verl_m2po.planner.facts import Assumed, Facts
from verl_m2po.planner.setting import FRESH_SHARES, REPLAYING, Setting
from verl_m2po.planner.simulate import run_s, simulate
from verl_m2po.planner.workload import PlanError

CLOSE = 0.02
"""Settings that are less than this share apart in speed count as equally fast; the younger data win."""


@dataclass(frozen=True)
class Choice:
    """A setting on so many devices, and what became of it.

    Args:
        setting: mode, staleness and replay.
        devices: of the whole run.
        server_devices: that generate; in the shared modes all of them.
        updates_per_step: optimizer updates of a trainer step.
        buffer_gib: memory of the waiting rollouts if every response has its full length.
        outcome: simulated.
        run_s: seconds of the whole run.
    """

    setting: Setting
    devices: int
    server_devices: int
    updates_per_step: int
    buffer_gib: float
    outcome: Outcome
    run_s: float

    @property
    def staleness_updates(self) -> int:
        """The mode's setting: exact, or in `bounded_async` the bound, in optimizer updates."""
        return self.setting.staleness_steps * self.updates_per_step

    @property
    def mean_age_updates(self) -> float:
        """Of a trained token when the first update of its step is made."""
        return self.outcome.mean_age * self.updates_per_step

    @property
    def tokens_per_device_hour(self) -> float:
        """Trained tokens."""
        return self.outcome.tokens_per_s * 3600 / self.devices

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.run_s / 3600

    def overrides(self) -> list[tuple[str, str]]:
        """Hydra overrides, ready to paste, each with the reason in one sentence."""
        mode, outcome = self.setting.mode, self.outcome
        reasons = [
            (
                f"trainer.v1.trainer_mode={mode}",
                f"{outcome.mean_step_s:.1f} s a trainer step, of which the trainer waits {outcome.trainer_idle:.0%}.",
            )
        ]
        if mode != "sync":
            kept = "at most" if mode in REPLAYING else "exactly"
            reasons.append(
                (
                    f"trainer.v1.{mode}.staleness_updates={self.staleness_updates}",
                    f"Trained tokens are {kept} that old, {self.mean_age_updates:.1f} updates on average.",
                )
            )
        if self.setting.is_replaying:
            least = FRESH_SHARES[self.setting.replay]
            reasons.append(
                (
                    f"replay={self.setting.replay}",
                    f"{outcome.replayed_share:.0%} of the trained prompts were trained before; at least {least:.1%} of "
                    "a batch is new.",
                )
            )
        if not self.setting.is_shared:
            reasons.append(
                (
                    "actor_rollout_ref.hybrid_engine=false",
                    f"{self.server_devices} of the {self.devices} devices only generate: give them as "
                    "actor_rollout_ref.rollout.nnodes x n_gpus_per_node.",
                )
            )
        return reasons


def stalenesses(mode: str, most_steps: int) -> list[int]:
    """Powers of two, 0 and the largest: in trainer steps."""
    if mode == "sync":
        return [0]
    powers = [1 << i for i in range(most_steps.bit_length()) if 1 << i <= most_steps]
    return sorted({0, *powers, most_steps})


def splits(devices: int, server_size: int, shares: Sequence[float]) -> list[int]:
    """How many devices may generate where they do nothing else: whole servers, and at least one device to train.

    Raises:
        PlanError: there are too few devices for a server and a trainer.
    """
    most = (devices - 1) // server_size
    if not most:
        raise PlanError(
            f"--devices {devices} cannot be split into a server of {server_size} and a trainer; add devices"
        )
    servers = {min(most, max(1, round(devices * share / server_size))) for share in shares}
    return sorted(count * server_size for count in servers)


def settings(modes: Sequence[str], most_updates: int, facts: Facts, replays: Sequence[str] = ()) -> list[Setting]:
    """All that are compared.

    Args:
        modes: trainer modes.
        most_updates: largest staleness, optimizer updates.
        facts: for the updates of a trainer step.
        replays: options of the group `replay`, beside none, in the modes that have them.

    Raises:
        PlanError: the largest staleness is no whole number of trainer steps, and the nearest ones are named; or replay
            is asked for without a mode that has it, or such a mode without replay.
    """
    per_step = facts.updates_per_step or 1
    steps, rest = divmod(most_updates, per_step)
    if most_updates < 0 or rest:
        below, above = max(0, steps) * per_step, (max(-1, steps) + 1) * per_step
        raise PlanError(
            f"--max-staleness {most_updates} updates is no whole number of trainer steps of {per_step}; set it to "
            f"{below} or {above}"
        )
    if replays and not set(modes) & set(REPLAYING):
        raise PlanError(f"--replay {replays[0]}: of the modes only {' and '.join(REPLAYING)} train a rollout again")
    if "replay" in modes and not replays:
        raise PlanError("--modes replay trains rollouts again: give --replay too, such as --replay x4")
    found = [Setting(mode, stale) for mode in modes if mode != "replay" for stale in stalenesses(mode, steps)]
    # Nothing that was trained is young enough for a bound of 0.
    return found + [
        Setting(mode, stale, replay=replay)
        for mode in modes
        if mode in REPLAYING
        for replay in replays
        for stale in stalenesses(mode, steps)
        if stale
    ]


def compare(
    facts: Facts,
    assumed: Assumed,
    modes: Sequence[str],
    most_updates: int,
    shares: Sequence[float],
    steps: int,
    seed: int,
    run_steps: int,
    buffer_bytes: Callable[[Facts, Setting], int],
    replays: Sequence[str] = (),
) -> Iterator[Choice]:
    """Simulate them one by one.

    Args:
        facts: whole.
        assumed: the rest.
        modes: trainer modes.
        most_updates: largest staleness, optimizer updates.
        shares: of the devices that generate, where these are separate.
        steps: trainer steps that count in each simulation.
        seed: of the simulations.
        run_steps: trainer steps of the whole run.
        buffer_bytes: memory of the waiting rollouts.
        replays: see `settings`.
    """
    assert facts.devices is not None and facts.updates_per_step is not None
    for setting in settings(modes, most_updates, facts, replays):
        shared = [facts.devices]
        for generating in shared if setting.is_shared else splits(facts.devices, facts.server_devices or 1, shares):
            trainer_devices = facts.devices if setting.is_shared else facts.devices - generating
            workload = facts.workload(generating, trainer_devices, assumed)
            outcome = simulate(setting, workload, steps, seed)
            gib = buffer_bytes(facts, setting) / 2**30
            whole_s = run_s(setting, workload, run_steps, outcome.mean_step_s, seed)
            yield Choice(setting, facts.devices, generating, facts.updates_per_step, gib, outcome, whole_s)


def pareto(choices: Sequence[Choice]) -> list[Choice]:
    """Those for which no other is faster and younger."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.outcome.mean_step_s, each.outcome.mean_age)):
        if not best or choice.outcome.mean_age < best[-1].outcome.mean_age:
            best.append(choice)
    return best


def recommend(
    choices: Sequence[Choice], target_age_updates: float | None, deadline_h: float | None, run_steps: int
) -> Choice:
    """The fastest that keeps the limits; of those that are nearly as fast the one with the youngest data.

    Args:
        choices: simulated.
        target_age_updates: largest mean age of a trained token, optimizer updates; None: any.
        deadline_h: hours of the whole run; None: any.
        run_steps: trainer steps of the whole run.

    Raises:
        PlanError: none keeps them; says what the best would need.
    """
    young = [each for each in choices if target_age_updates is None or each.mean_age_updates <= target_age_updates]
    if not young:
        least = min(each.mean_age_updates for each in choices)
        raise PlanError(
            f"--target-age {target_age_updates:g}: the youngest data are {least:.1f} updates old on average"
        )
    fastest = min(each.outcome.mean_step_s for each in young)
    best = min(
        (each for each in young if each.outcome.mean_step_s <= fastest * (1 + CLOSE)),
        key=lambda each: (each.outcome.mean_age, each.outcome.mean_step_s),
    )
    if deadline_h is None:
        return best
    in_time = [each for each in young if each.hours <= deadline_h]
    if not in_time:
        needed = min(each.hours for each in young)
        raise PlanError(f"--deadline {deadline_h:g}: {run_steps} trainer steps take {needed:.1f} hours at best")
    # Time enough: the youngest data that come home in it.
    return min(in_time, key=lambda each: (each.outcome.mean_age, each.outcome.mean_step_s))
