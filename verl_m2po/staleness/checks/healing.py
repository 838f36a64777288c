"""Can rollout servers be replaced, where the run is to go on without a dead one?"""

import math
from collections.abc import Iterable, Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import mode_and_settings
from verl_m2po.staleness.config import SeparateConfig

_ROLLOUT = "actor_rollout_ref.rollout"
BACKEND, DISAGGREGATION = f"{_ROLLOUT}.checkpoint_engine.backend", f"{_ROLLOUT}.disaggregation.enabled"

_DEVICES = [Number(f"{_ROLLOUT}.{name}", 0, may_be_null=True) for name in ("nnodes", "n_gpus_per_node")]
_PARALLEL = [
    Number(f"{_ROLLOUT}.{name}_parallel_size", 1, default=1) for name in ("tensor_model", "data", "pipeline_model")
]


def why_not(config: DictConfig) -> str | None:
    """Why the servers of a run cannot be replaced; None if they can."""
    if read(config, BACKEND) == "delta_sharded":
        return f"{BACKEND}=delta_sharded sends only changes, and a new server has nothing to change"
    if read(config, DISAGGREGATION):
        return f"with {DISAGGREGATION}=true a server is several engines that know each other"
    return None


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield that a run will end with the first server that dies, though it is to heal, or cannot have more servers."""
    mode, settings = mode_and_settings(config)
    if not isinstance(settings, SeparateConfig):
        return
    why = why_not(config)
    if settings.heal and why is not None:
        key, remedy = f"trainer.v1.{mode}.heal", f"trainer.v1.{mode}.restarts restarts the command instead"
        yield Problem(key, True, f"{why}: the run ends with the first server that dies", remedy, is_fatal=False)
    if settings.max_replicas is not None:
        yield from _joining(config, f"trainer.v1.{mode}", settings, why)


def _joining(config: DictConfig, section: str, settings: SeparateConfig, why: str | None) -> Iterator[Problem]:
    key, most, first = f"{section}.max_replicas", settings.max_replicas, replicas_at_the_start(config)
    if not settings.heal:
        why, remedy = "with heal=false no server can join", f"Set {section}.heal=true, or leave it out"
        yield Problem(key, most, why, remedy)
    elif why is not None:
        yield Problem(key, most, f"{why}: no server can join", "Leave it out")
    elif most is not None and 0 < most < first:  # what is no number of servers at all: numbers.py
        why = f"the run starts with {first} rollout servers ({_ROLLOUT}.nnodes and n_gpus_per_node)"
        yield Problem(key, most, why, f"Set it to {first} or more; null adds none")


def replicas_at_the_start(config: DictConfig) -> int:
    """How many rollout servers verl starts on the devices that the configuration gives to the rollout.

    Raises:
        WrongValue: a number of devices is none.
    """
    return math.prod(_numbers(config, _DEVICES)) // math.prod(_numbers(config, _PARALLEL))


def _numbers(config: DictConfig, numbers: Iterable[Number]) -> Iterator[int]:
    for number in numbers:
        value = number.of(config)
        yield 0 if value is None else int(value)
