"""Reward workers that Ray starts again where they die, under the same handle; what one was scoring is scored again."""

import logging
import warnings
from contextlib import AbstractContextManager
from typing import Any

import ray
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopWorker

from verl_m2po.ground import logs
from verl_m2po.patches import verl as verl_patches

logger = logging.getLogger(__name__)

STARTED_AGAIN: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 1}
"""Of Ray's actors. A response is scored again once; one under which a second worker dies has failed."""


class RestartableRewardLoopWorker(RewardLoopWorker):
    """verl's, which says when it takes the place of one that died, and lets a reward model judge.

    Args:
        config: verl's, as YAML; so short that Ray keeps it with the actor. What is in Ray's store may be gone when it
            is needed again (Ray issue 53727).
        others: verl's other arguments.
    """

    def __init__(self, config: str, *others: Any) -> None:
        whole: DictConfig = OmegaConf.create(config)  # pyright: ignore[reportAssignmentType]
        OmegaConf.set_struct(whole, True)  # as Hydra's
        super().__init__(whole, *others)
        logs.follow_verl()
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # Ray's, of Ray's own code
            takes_a_place = ray.get_runtime_context().was_current_actor_reconstructed
        if takes_a_place:
            logger.warning("a reward worker died: this one takes its place, and scores again what it was scoring")

    async def compute_score_disrm(self, data: DataProto) -> dict[str, Any]:
        """verl's score of a reward model, with what verl's agent loop reads beside it: a reward model says no more.

        verl 0.9.1 leaves it out (verl/experimental/reward_loop/reward_loop.py), and each response fails with `KeyError:
        'reward_extra_info'`. Delete when verl returns it.
        """
        return {"reward_extra_info": {}, **await super().compute_score_disrm(data)}


class ActorClass:
    """What verl makes its reward workers of; as an actor class of Ray's.

    Args:
        of: a `RestartableRewardLoopWorker`.
        options: Ray's, of an actor.
    """

    def __init__(self, of: type, options: dict[str, Any]) -> None:
        self._of, self._options = of, options

    def options(self, **options: Any) -> "ActorClass":
        """As Ray's; verl starts each actor with its own."""
        return ActorClass(self._of, self._options | options)

    def remote(self, config: DictConfig, *others: Any) -> Any:
        """Start one."""
        return ray.remote(self._of).options(**self._options).remote(OmegaConf.to_yaml(config), *others)


def ours(heals: bool) -> AbstractContextManager[None]:
    """In this block verl makes its reward workers of ours, which Ray starts again where the run heals.

    See Ray's "Fault tolerance: actors" (docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html).
    """
    return verl_patches.reward_workers_of(ActorClass(RestartableRewardLoopWorker, STARTED_AGAIN if heals else {}))
