"""Can groups be filtered as `algorithm.filter_groups` asks?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import overridden_keys, read
from verl_m2po.staleness.checks.numbers import RESPONSES, mode_and_settings
from verl_m2po.staleness.dynamic_sampling import ENABLE, METRIC, MOST_IN_FLIGHT, DynamicSampling

REWARD_MODEL = "reward.reward_model"


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what rules out that groups without advantage are replaced."""
    if DynamicSampling.of(config) is None:
        return
    if not METRIC.of(config):
        yield Problem(
            METRIC.key, "", "groups are filtered by a metric, and none is named", "Set it to reward, or to acc"
        )
    mode, _ = mode_and_settings(config)
    if RESPONSES.of(config) == 1:
        why = f"with one response to a prompt ({RESPONSES.key}=1) nothing differs within a group, and verl filters none"
        yield Problem(ENABLE, True, why, f"Set {RESPONSES.key} to 2 or more, or this to false")
    if read(config, f"{REWARD_MODEL}.enable") and not read(config, f"{REWARD_MODEL}.enable_resource_pool"):
        why = "a reward model that shares the trainer's devices gives its rewards after the batch has been chosen"
        yield Problem(ENABLE, True, why, f"Set {REWARD_MODEL}.enable_resource_pool=true, or this to false")
    if mode == "bounded_async" and MOST_IN_FLIGHT.key in overridden_keys(config):
        why = "bounded_async generates as many batches at a time as its bound admits, as verl's asynchronous modes do"
        yield Problem(MOST_IN_FLIGHT.key, MOST_IN_FLIGHT.of(config), why, "Leave it out", is_fatal=False)
