"""Can the command go on by itself after an error, if it is asked to?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import SAVE_FREQ, mode_and_settings
from verl_m2po.staleness.config import is_chosen

RESUME_MODE = "trainer.resume_mode"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what a restart would go on from nothing for, or would do again."""
    if not is_chosen(config):
        return
    mode, settings = mode_and_settings(config)
    if settings.restarts == 0:
        return
    key = f"trainer.v1.{mode}.restarts"
    if (resume := read(config, RESUME_MODE)) != "auto":
        why = f"a restart goes on from the last checkpoint, which {RESUME_MODE}={resume} does not look for"
        yield Problem(key, settings.restarts, why, f"Set {RESUME_MODE}=auto, or restarts=0")
    if SAVE_FREQ.of(config) < 1 and not settings.journal:
        why = "without checkpoints and a journal every restart begins at the first trainer step"
        yield Problem(key, settings.restarts, why, f"Set {SAVE_FREQ.key} to some steps, or restarts=0")
    if "MULTIRUN" in str(read(config, "hydra.mode")):
        why = "the command of a sweep is all of its jobs, and a restart would do the finished ones again"
        yield Problem(key, settings.restarts, why, "Start the job alone, or set restarts=0")
