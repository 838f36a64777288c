"""The only place that converts between optimizer updates, trainer steps and weight versions.

Three clocks tick in a run, and every name in this package says which one it means:

- *optimizer updates*: calls of ``optimizer.step``. Staleness is configured and reported in these, as in the paper.
- *trainer steps*: verl's ``global_steps``, counted from 1. One trainer step makes ``updates_per_step`` updates.
- *weight versions*: what the rollout servers hold. Version v is the weights after trainer step v; version 0 is the
  base model. verl pushes one version at the end of each trainer step, so trainer step t begins with version t - 1.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass


class StalenessUnitsError(ValueError):
    """A staleness, or the batch sizes it is counted in, that the trainer cannot honour."""


def _require_positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise StalenessUnitsError(f"{name} is {value!r}; it must be a whole number of at least 1")
    return value


@dataclass(frozen=True)
class UpdateClock:
    """Converts between the three clocks of one run.

    Args:
        train_batch_size: `data.train_batch_size`, prompts per trainer step.
        ppo_mini_batch_size: `actor_rollout_ref.actor.ppo_mini_batch_size`, prompts per optimizer update.
        ppo_epochs: `actor_rollout_ref.actor.ppo_epochs`, passes over each batch.

    Raises:
        StalenessUnitsError: a size is not a positive whole number, or the mini-batch does not divide the batch.
    """

    train_batch_size: int
    ppo_mini_batch_size: int
    ppo_epochs: int = 1

    def __post_init__(self) -> None:
        _require_positive_int("data.train_batch_size", self.train_batch_size)
        _require_positive_int("actor_rollout_ref.actor.ppo_mini_batch_size", self.ppo_mini_batch_size)
        _require_positive_int("actor_rollout_ref.actor.ppo_epochs", self.ppo_epochs)
        if self.train_batch_size % self.ppo_mini_batch_size:
            raise StalenessUnitsError(
                f"data.train_batch_size={self.train_batch_size} is not a multiple of "
                f"actor_rollout_ref.actor.ppo_mini_batch_size={self.ppo_mini_batch_size}, so a trainer step does not "
                "make a whole number of optimizer updates; change one of the two"
            )

    @property
    def mini_batches_per_step(self) -> int:
        """Mini-batches per trainer step; verl's `parameter_sync_step` where trainer and rollout are separate."""
        return self.train_batch_size // self.ppo_mini_batch_size

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates per trainer step, and so per weight version."""
        return self.mini_batches_per_step * self.ppo_epochs

    def updates_of_rows(self, rows: int, responses: int) -> int:
        """Optimizer updates that verl's worker makes of a batch: it cuts mini-batches by rows, padding included.

        Args:
            rows: trajectories of the batch, as the worker gets them.
            responses: `actor_rollout_ref.rollout.n`. An agent loop may return more trajectories for each.
        """
        return rows // (self.ppo_mini_batch_size * responses) * self.ppo_epochs

    def steps(self, staleness_updates: int, key: str = "staleness_updates") -> int:
        """Staleness in trainer steps.

        Args:
            staleness_updates: staleness in optimizer updates; 0 is on-policy.
            key: the configuration key, for the error.

        Raises:
            StalenessUnitsError: negative, not whole, or not a whole number of trainer steps.
        """
        if isinstance(staleness_updates, bool) or not isinstance(staleness_updates, int):
            raise StalenessUnitsError(f"{key} is {staleness_updates!r}; it counts optimizer updates: a whole number")
        if staleness_updates < 0:
            raise StalenessUnitsError(f"{key} is {staleness_updates}; it cannot be negative, 0 is on-policy")
        steps, rest = divmod(staleness_updates, self.updates_per_step)
        if rest:
            below, above = self.updates(steps), self.updates(steps + 1)
            raise StalenessUnitsError(
                f"{key}={staleness_updates} optimizer updates is not a whole number of trainer steps: one step makes "
                f"{self.updates_per_step} updates (train_batch_size {self.train_batch_size} / ppo_mini_batch_size "
                f"{self.ppo_mini_batch_size} x ppo_epochs {self.ppo_epochs}). Set it to {below} or {above}"
            )
        return steps

    def updates(self, steps: int) -> int:
        """Optimizer updates in `steps` trainer steps."""
        return steps * self.updates_per_step

    def age_updates(self, version: int, at_version: int) -> int:
        """Age of a token of weight `version`, in optimizer updates, when training starts from `at_version`.

        The j-th update inside the step (from 0) adds j: a batch of age s is trained at s .. s + updates_per_step - 1.
        """
        return self.updates(at_version - version)


class UpdateCount:
    """Optimizer updates that each trainer step really made, since they need not be those of the configuration.

    verl cuts a batch into mini-batches by rows, so an agent loop that returns several trajectories for one prompt makes
    more updates; `trainer.critic_warmup` makes steps without any.

    Args:
        clock: says how many updates a step makes of which nothing else is known.
    """

    def __init__(self, clock: UpdateClock) -> None:
        self.clock = clock
        self._count({})

    def _count(self, made: Mapping[int, int]) -> None:
        """Begin anew with the updates of each trainer step in `made`."""
        self._made: dict[int, int] = {}
        # The steps of `_made`, ascending, and how many more updates than usual were made up to the end of each. The age
        # of every trained row is asked for: it must not take longer the older the row or the longer the run.
        self._steps: list[int] = []
        self._surplus: list[int] = []
        for step in sorted(made):
            self.add(step, made[step])

    def add(self, step: int, updates: int) -> None:
        """Trainer step `step` makes that many updates, on top of those that were added for it before."""
        if self._steps and step < self._steps[-1]:
            self._count(self._made | {step: self.in_step(step) + updates})
        elif step in self._made:
            self._made[step] += updates
            self._surplus[-1] += updates
        else:
            self._made[step] = updates
            self._surplus.append(self._surplus_until(step) + updates - self.clock.updates_per_step)
            self._steps.append(step)

    def in_step(self, step: int) -> int:
        """Updates that were added for trainer step `step` so far; 0 if none were."""
        return self._made.get(step, 0)

    def between(self, version: int, at_version: int) -> int:
        """Updates between two weight versions: the age of a token of `version` when training starts from `at_version`.

        The j-th update inside the step (from 0) adds j.
        """
        if at_version <= version:
            return 0
        usual = self.clock.updates(at_version - version)
        return usual + self._surplus_until(at_version) - self._surplus_until(version)

    def _surplus_until(self, version: int) -> int:
        place = bisect_right(self._steps, version)
        return self._surplus[place - 1] if place else 0

    def oldest_within(self, bound_updates: int, at_version: int, oldest_version: int) -> int:
        """The oldest version, `oldest_version` at least, that is at most `bound_updates` old at `at_version`."""
        versions = range(oldest_version, at_version)
        too_old = bisect_left(versions, -bound_updates, key=lambda version: -self.between(version, at_version))
        return min(oldest_version + too_old, at_version)

    def state_dict(self) -> list[list[int]]:
        """[step, updates] of the steps whose number of updates is not that of the clock, as plain JSON."""
        return [[step, n] for step, n in sorted(self._made.items()) if n != self.clock.updates_per_step]

    def load_state_dict(self, state: list[list[int]]) -> None:
        """Put back what `state_dict` returned."""
        self._count({step: updates for step, updates in state})


def version_at_step(step: int) -> int:
    """The weight version that trainer step `step` (from 1) starts from, and that the rollout holds meanwhile."""
    return step - 1


def version_after_step(step: int) -> int:
    """The weight version that trainer step `step` pushes to the rollout."""
    return step


def exact_version(batch_index: int, k_steps: int) -> int:
    """The weight version that generates batch `batch_index` (from 0) when staleness is exactly `k_steps`.

    Batches 0 .. k_steps come from the base model: the ramp. Batch i is trained at trainer step i + 1.
    """
    return max(0, batch_index - k_steps)
