"""Can a bound move between the limits that are asked for, and does the chosen mode have a bound at all?"""

from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.checks.numbers import mode_and_settings, staleness_steps
from verl_m2po.staleness.config import AdaptiveConfig, BoundedAsyncConfig
from verl_m2po.staleness.rule.units import StalenessUnitsError, UpdateClock

SECTION = "trainer.v1.bounded_async"
KEY = f"{SECTION}.adaptive"
NUMBERS = (
    Number("target_masked_fraction", 0, 1, is_whole=False, excludes_least=True, meaning="a share of the tokens"),
    Number("target_second_moment", 0, is_whole=False, excludes_least=True, meaning="a second moment"),
    Number("waiting_share", 0, 1, is_whole=False, meaning="a share of a trainer step"),
    Number("quiet_share", 0, 1, is_whole=False, excludes_least=True, meaning="a share of the targets, below 1"),
    Number("patience_steps", 1, meaning="a number of trainer steps"),
)
LIMITS = ("min_staleness_updates", "max_staleness_updates")


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield settings of a moving bound that no run can honour."""
    _, settings = mode_and_settings(config)
    if isinstance(settings, BoundedAsyncConfig) and settings.adaptive.enable:
        yield from [*_ranges(settings.adaptive), *_limits(config, settings)]


def in_another_mode(config: DictConfig) -> Iterator[Problem]:
    """Yield a moving bound that was asked for in a mode without one."""
    mode = read(config, TRAINER_MODE)
    if mode == "bounded_async" or OmegaConf.select(config, f"{KEY}.enable") is not True:
        return
    promises = {
        "sync": "has no bound",
        "replay": "has a window of what is trained again: nothing waits for it to rise, and new rollouts have no age",
    }
    why = f"trainer.v1.trainer_mode={mode} {promises.get(str(mode), 'promises one age, and no bound')}"
    yield Problem(f"{KEY}.enable", True, why, f"Set {TRAINER_MODE}=bounded_async beside it, or leave it out")


def _ranges(adaptive: AdaptiveConfig) -> Iterator[Problem]:
    for number in NUMBERS:
        problem = number.problem_of(getattr(adaptive, number.key))
        if problem is not None:
            yield problem._replace(key=f"{KEY}.{number.key}")
    if adaptive.quiet_share == 1:
        why = "a bound that may rise right below the target would fall again"
        yield Problem(f"{KEY}.quiet_share", adaptive.quiet_share, why, "Set it below 1, such as to 0.5")


def _limits(config: DictConfig, settings: BoundedAsyncConfig) -> Iterator[Problem]:
    (clock, _), adaptive = staleness_steps(config), settings.adaptive
    wrong = [problem for name in LIMITS if (problem := _no_steps(clock, name, getattr(adaptive, name))) is not None]
    yield from wrong
    least, most = adaptive.min_staleness_updates, adaptive.max_staleness_updates
    if wrong or most is None:
        return
    if least > most:
        why = f"it is above {KEY}.max_staleness_updates={most}"
        yield Problem(f"{KEY}.min_staleness_updates", least, why, f"Set it to {most} or less")
    elif least == most:
        why = "it is max_staleness_updates too, so the bound cannot move"
        yield Problem(f"{KEY}.min_staleness_updates", least, why, "Set it lower", is_fatal=False)
    if settings.staleness_updates != most:
        why = f"the bound moves up to {KEY}.max_staleness_updates={most}"
        remedy = f"Set it to {most}, or leave it out beside staleness=adaptive"
        yield Problem(f"{SECTION}.staleness_updates", settings.staleness_updates, why, remedy)


def _no_steps(clock: UpdateClock, name: str, value: int | None) -> Problem | None:
    if value is None:
        return Problem(f"{KEY}.{name}", None, "nothing says how far the bound may rise", "Set it, such as to 64")
    try:
        clock.steps(value, f"{KEY}.{name}")
    except StalenessUnitsError as error:
        return Problem(f"{KEY}.{name}", value, str(error), "See the table of units in docs/staleness.md")
    return None
