"""Is the staleness a whole number of trainer steps, and do the settings agree on the updates of one?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.staleness.checks.numbers import EPOCHS, mode_and_settings, staleness_steps
from verl_m2po.staleness.config import SEPARATE_MODES


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield a staleness that is no number of trainer steps, and mention one that grows within a step."""
    clock, _ = staleness_steps(config)
    if clock.ppo_epochs > 1:
        yield Problem(
            EPOCHS.key,
            clock.ppo_epochs,
            f"every batch is trained {clock.ppo_epochs} times, so its last epoch is "
            f"{clock.updates_per_step - clock.mini_batches_per_step} updates staler than its first",
            "Set it to 1 to have one age per batch",
            is_fatal=False,
        )


def sync_step(config: DictConfig) -> Iterator[Problem]:
    """1 is the default and means nothing; the modes set what follows from the batch sizes."""
    mode, settings = mode_and_settings(config)
    value = settings.parameter_sync_step
    if value == 1:
        return
    key = f"trainer.v1.{mode}.parameter_sync_step"
    remedy = "Remove it; actor.ppo_mini_batch_size sets the updates per step"
    if mode not in SEPARATE_MODES:
        why = "where trainer and rollout share the devices, the weights are pushed once per trainer step"
        yield Problem(key, value, why, remedy)
        return
    mini_batches = staleness_steps(config)[0].mini_batches_per_step
    if value != mini_batches:
        why = f"one weight version is pushed per trainer step, which has {mini_batches} mini-batches"
        yield Problem(key, value, why, remedy)
