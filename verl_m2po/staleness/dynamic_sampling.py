"""Dynamic sampling (`algorithm.filter_groups`) as the staleness modes read it: verl's keys, verl's meaning.

See "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" by Yu et al. (arXiv:2503.14476), Sec. 3.2.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from verl_m2po.ground.settings import Number, Text
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.rule.informative import InformativeWindow

ENABLE = "algorithm.filter_groups.enable"
REWARD = "reward"
METRIC = Text("algorithm.filter_groups.metric", "reward, or the name of a value that the reward function returns")
MOST_BATCHES = Number(
    "algorithm.filter_groups.max_num_gen_batches",
    default=0,
    meaning="batches that may be generated to fill one, 0 for no limit",
)
MOST_IN_FLIGHT = Number(
    "algorithm.filter_groups.max_inflight_gen_batches", 1, default=1, meaning="batches that are generated at a time"
)


@dataclass(frozen=True)
class DynamicSampling:
    """What is asked of dynamic sampling.

    Args:
        metric: `reward`, or the name of a value in the reward's extra information: a finished group all of whose
            trajectories have the same is set aside and replaced.
        most_batches: batches of prompts that may be generated to fill one; None never gives up.
        most_in_flight_batches: batches of prompts that the exact modes generate at a time.
    """

    metric: str
    most_batches: int | None
    most_in_flight_batches: int

    @classmethod
    def of(cls, config: DictConfig) -> "DynamicSampling | None":
        """What `config` asks for; None where it asks for none.

        Raises:
            WrongValue: a setting is not what it must be.
        """
        if not read(config, ENABLE):
            return None
        most = MOST_BATCHES.of(config)
        return cls(METRIC.of(config), most if most > 0 else None, MOST_IN_FLIGHT.of(config))


def most_in_flight(sampling: DynamicSampling | None, batch_size: int) -> int | None:
    """Most prompt groups that are generated at a time; None for no limit.

    Args:
        batch_size: prompt groups per trainer step.
    """
    return None if sampling is None else sampling.most_in_flight_batches * batch_size


def informative_window(sampling: DynamicSampling | None, batch_size: int) -> InformativeWindow | None:
    """What ends a run whose prompts teach it too little; None where nothing does.

    Args:
        batch_size: prompt groups per trainer step.
    """
    if sampling is None or sampling.most_batches is None:
        return None
    return InformativeWindow(sampling.metric, sampling.most_batches, batch_size)
