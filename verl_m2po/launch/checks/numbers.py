"""Are verl's numbers that we or the losses count with numbers, in any trainer mode? Those of a mode are its own."""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import read
from verl_m2po.launch.checks.data import MAX_SAMPLES
from verl_m2po.staleness.checks.memory import CAPACITY
from verl_m2po.staleness.checks.numbers import OF_VERL
from verl_m2po.staleness.checks.sampling import TEMPERATURE, TOP_K, TOP_P

NODES = Number("trainer.nnodes", 1, default=1, meaning="machines that train")
DEVICES = Number("trainer.n_gpus_per_node", 1, default=1, meaning="devices of a machine that train")
ROLLOUT_NODES = Number(
    "actor_rollout_ref.rollout.nnodes", 0, may_be_null=True, default=0, meaning="machines that only generate"
)
ROLLOUT_DEVICES = Number(
    "actor_rollout_ref.rollout.n_gpus_per_node", 0, may_be_null=True, default=0, meaning="devices of such a machine"
)
TEST_FREQ = Number("trainer.test_freq", -1, default=-1, meaning="trainer steps between validations, -1 never validates")

TABLE = (
    *(*OF_VERL, TEMPERATURE, TOP_P, TOP_K, CAPACITY, *MAX_SAMPLES.values()),
    *(NODES, DEVICES, ROLLOUT_NODES, ROLLOUT_DEVICES, TEST_FREQ),
)


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield every number of verl's that is none, or is out of range."""
    for number in TABLE:
        problem = number.problem_of(read(config, number.key, number.default))
        if problem is not None:
            yield problem
