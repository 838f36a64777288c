"""What in a configuration contradicts the staleness that it asks for: found before anything is started.

Pure: configuration in, problems out. Each file asks about one thing. What a mode needs it sets itself, in trainer.py.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from omegaconf import DictConfig

from verl_m2po.ground.check import Check, ask_all
from verl_m2po.ground.problem import Problem
from verl_m2po.staleness.checks import (
    adaptive,
    dynamic_sampling,
    failed_trajectories,
    healing,
    memory,
    numbers,
    reference,
    replay,
    run_length,
    sampling,
    setup,
    units,
)
from verl_m2po.staleness.checks.run_length import planned_steps, too_short
from verl_m2po.staleness.config import is_chosen

__all__ = [
    "PreflightError",
    "Problem",
    "check",
    "checks",
    "planned_steps",
    "require_sound",
    "too_short",
]


logger = logging.getLogger(__name__)

Prompts = Callable[[DictConfig], int | None]
Images = Callable[[DictConfig], int]


class PreflightError(ValueError):
    """The configuration contradicts the staleness that it asks for."""


def require_sound(problems: list[Problem]) -> None:
    """Warn of what is odd, refuse what contradicts the configured staleness.

    Raises:
        PreflightError: with every fatal problem.
    """
    for problem in problems:
        if not problem.is_fatal:
            logger.warning("%s", problem)
    if fatal := [problem for problem in problems if problem.is_fatal]:
        raise PreflightError("\n".join(map(str, fatal)))


def _unknown(_config: DictConfig) -> None:
    return None


def _none(_config: DictConfig) -> int:
    return 0


def checks(
    available_memory_bytes: int | None = None, prompts: Prompts = _unknown, images: Images = _none
) -> Iterator[Check]:
    """Every question about a run in one of our trainer modes.

    Args:
        available_memory_bytes: memory of the machine; None leaves the memory unchecked where no limit is configured.
        prompts: how many the training set has at most, None where only the trainer will know.
        images: bytes of a prompt's token, beside its id, if it is one of an image; 0 where there are none.
    """
    questions = (
        Check("the numbers of the mode", numbers.problems, "trainer.v1"),
        Check("the units of the staleness", units.problems, "data.train_batch_size"),
        Check("parameter_sync_step", units.sync_step, "trainer.v1"),
        Check("how often a rollout is trained", replay.problems, "trainer.v1"),
        Check("the reference of the KL loss", reference.problems, reference.KEY),
        Check("dynamic sampling", dynamic_sampling.problems, dynamic_sampling.ENABLE),
        Check("a bound that moves", adaptive.problems, adaptive.KEY),
        Check("failed trajectories", failed_trajectories.problems, "trainer.v1"),
        Check("top_p", sampling.top_p, sampling.TOP_P.key),
        Check("top_k", sampling.top_k, sampling.TOP_K.key),
        Check("the temperature", sampling.temperature, sampling.TEMPERATURE.key),
        Check("what the mode replaces", setup.replaced, "trainer"),
        Check("devices that are lent", setup.lending, "trainer.v1.separate_async"),
        Check("asynchronous saving", setup.asynchronous_saving, "actor_rollout_ref.actor.checkpoint.async_save"),
        Check("the replacement of servers", healing.problems, "trainer.v1"),
        Check("the devices of the rollout", setup.devices, "actor_rollout_ref.rollout"),
        Check(
            "the memory for rollouts that wait",
            partial(memory.fits, available_memory_bytes=available_memory_bytes, images=images),
            "trainer.v1",
        ),
        Check("the entries of TransferQueue", memory.has_entries, memory.CAPACITY.key),
        Check("the length of the run", partial(run_length.problems, prompts=prompts), "trainer.total_training_steps"),
    )
    yield Check("replay in a mode without it", replay.in_another_mode, "trainer.v1")
    yield Check("a moving reference in a mode without it", reference.in_another_mode, reference.KEY)
    yield Check("a moving bound in a mode without it", adaptive.in_another_mode, adaptive.KEY)
    for question in questions:
        yield question._replace(ask=partial(_of_our_modes, question.ask))


def _of_our_modes(ask: Callable[[DictConfig], Iterable[Problem]], config: DictConfig) -> Iterator[Problem]:
    if is_chosen(config):
        yield from ask(config)


def check(config: DictConfig, available_memory_bytes: int | None = None) -> list[Problem]:
    """All problems of a verl configuration whose `trainer.v1.trainer_mode` is one of ours.

    Args:
        config: verl's configuration, resolved.
        available_memory_bytes: memory of the machine; None leaves the memory unchecked where no limit is configured.
    """
    return ask_all(checks(available_memory_bytes), config)
