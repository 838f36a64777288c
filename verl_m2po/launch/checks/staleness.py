"""Does the config contradict the staleness that it asks for, or the checkpoint that it would resume from?"""

from collections.abc import Iterator

import psutil
from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.staleness import checks
from verl_m2po.staleness.config import MODE_DEFAULTS, load_mode_config
from verl_m2po.staleness.restart import resume


def is_chosen(config: DictConfig) -> bool:
    """Return whether `config` runs in a trainer mode of this package."""
    return OmegaConf.select(config, "trainer.v1.trainer_mode") in MODE_DEFAULTS


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what contradicts the staleness of `config`, and what keeps it from resuming."""
    if is_chosen(config):
        yield from checks.check(config, available_memory_bytes=psutil.virtual_memory().total)
        yield from _run_length(config)
    yield from resume.problems(config)


def _run_length(config: DictConfig) -> Iterator[Problem]:
    """Where the config says how long the run is. Where the data set says it, the trainer asks once it has that."""
    total_steps = OmegaConf.select(config, "trainer.total_training_steps")
    if total_steps is None:
        return
    mode = config.trainer.v1.trainer_mode
    try:
        clock = checks.make_clock(config)
        staleness_steps = clock.steps(load_mode_config(config, mode).staleness_updates)
    except ValueError:
        return  # reported by checks.check
    yield from checks.check_run_length(staleness_steps, clock, mode, total_steps)
