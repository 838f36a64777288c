"""Does the staleness fit into the run at all?"""

from collections.abc import Callable, Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.staleness.checks.numbers import (
    TOTAL_EPOCHS,
    TOTAL_STEPS,
    TRAIN_BATCH_SIZE,
    mode_and_settings,
    staleness_steps,
)
from verl_m2po.staleness.config import AHEAD, BoundedAsyncConfig
from verl_m2po.staleness.rule.units import UpdateClock


def problems(config: DictConfig, prompts: Callable[[DictConfig], int | None]) -> Iterator[Problem]:
    """Yield a staleness that the run is too short for, as far as its length is known before it starts.

    Args:
        prompts: how many the training set has at most; None where only the trainer will know.
    """
    total_steps = planned_steps(config, prompts(config))
    if total_steps is not None:
        yield from too_short(config, total_steps)


def too_short(config: DictConfig, total_steps: int) -> list[Problem]:
    """Why a run of `total_steps` trainer steps is too short for what `config` asks.

    Raises:
        WrongValue: a number is none, or is no whole number of trainer steps.
    """
    mode, settings = mode_and_settings(config)
    clock, steps = staleness_steps(config)
    if isinstance(settings, BoundedAsyncConfig) and settings.reuses:
        # The window is of what is trained again: a new rollout is no older than generation runs ahead.
        return check_run_length(settings.ahead_steps(clock), clock, mode, total_steps, AHEAD)
    return check_run_length(steps, clock, mode, total_steps)


def planned_steps(config: DictConfig, prompts: int | None) -> int | None:
    """Trainer steps after which verl ends the run: those of its epochs, or `trainer.total_training_steps` if fewer.

    Args:
        prompts: in the training set; None if unknown.

    Returns:
        None where neither the config nor the data set says.
    """
    steps = TOTAL_STEPS.of(config)
    if prompts is None:
        return steps
    in_epochs = prompts // TRAIN_BATCH_SIZE.of(config) * TOTAL_EPOCHS.of(config)
    return in_epochs if steps is None else min(steps, in_epochs)


def check_run_length(
    staleness_steps: int, clock: UpdateClock, mode: str, total_steps: int, key: str | None = None
) -> list[Problem]:
    """Whether the staleness fits into a run.

    Args:
        staleness_steps: largest age of a rollout that is trained for the first time, in trainer steps.
        total_steps: trainer steps of the whole run.
        key: what sets it; None: the staleness of the mode.
    """
    # Under replay every batch has rollouts of its own weights, however far back the others may come from.
    if mode == "replay" or staleness_steps == 0 or staleness_steps < total_steps:
        return []
    longest = max(0, clock.updates(total_steps - 1))
    return [
        Problem(
            f"trainer.v1.{mode}.staleness_updates" if key is None else key,
            clock.updates(staleness_steps),
            f"the run has {total_steps} trainer steps of {clock.updates_per_step} updates, so it would end before it "
            "trains on a rollout of its own weights",
            f"Set it to at most {longest}, or make the run longer (trainer.total_training_steps, trainer.total_epochs)",
        )
    ]
