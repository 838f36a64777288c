"""Can rollout servers be replaced, where the run is to go on without a dead one?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import mode_and_settings
from verl_m2po.staleness.config import SeparateConfig

_ROLLOUT = "actor_rollout_ref.rollout"
BACKEND, DISAGGREGATION = f"{_ROLLOUT}.checkpoint_engine.backend", f"{_ROLLOUT}.disaggregation.enabled"


def why_not(config: DictConfig) -> str | None:
    """Why the servers of a run cannot be replaced; None if they can."""
    if read(config, BACKEND) == "delta_sharded":
        return f"{BACKEND}=delta_sharded sends only changes, and a new server has nothing to change"
    if read(config, DISAGGREGATION):
        return f"with {DISAGGREGATION}=true a server is several engines that know each other"
    return None


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield that a run will end with the first server that dies, though it is to heal."""
    mode, settings = mode_and_settings(config)
    if isinstance(settings, SeparateConfig) and settings.heal and (why := why_not(config)) is not None:
        key, remedy = f"trainer.v1.{mode}.heal", f"trainer.v1.{mode}.restarts restarts the command instead"
        yield Problem(key, True, f"{why}: the run ends with the first server that dies", remedy, is_fatal=False)
