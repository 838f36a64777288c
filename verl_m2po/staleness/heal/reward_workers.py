"""Reward workers that Ray starts again where they die, under the same handle; what one was scoring is scored again."""

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import ray
from verl.experimental.reward_loop import RewardLoopWorker

from verl_m2po.ground import logs
from verl_m2po.patches import verl as verl_patches

logger = logging.getLogger(__name__)

STARTED_AGAIN: dict[str, Any] = {"max_restarts": -1, "max_task_retries": 1}
"""Of Ray's actors. A response is scored again once; one under which a second worker dies has failed."""


class RestartableRewardLoopWorker(RewardLoopWorker):
    """verl's, which says when it takes the place of one that died."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        logs.follow_verl()
        with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):  # Ray's, of Ray's own code
            takes_a_place = ray.get_runtime_context().was_current_actor_reconstructed
        if takes_a_place:
            logger.warning("a reward worker died: this one takes its place, and scores again what it was scoring")


def actor_class(of: type) -> Any:
    """What verl makes its reward workers of, so that Ray starts them again."""
    return _ActorClass(ray.remote(**STARTED_AGAIN)(of))


class _ActorClass:
    """Ray's actor class, as verl calls it, whose constructor's arguments are there for as long as this object.

    Those that Ray puts into its store by itself may be gone when it starts an actor again (Ray issue 53727).
    """

    def __init__(self, of: Any) -> None:
        self._of, self._kept = of, list[Any]()

    def options(self, **options: Any) -> "_ActorClass":
        """As Ray's; verl starts each actor with its own."""
        started = _ActorClass(self._of.options(**options))
        started._kept = self._kept
        return started

    def remote(self, *arguments: Any) -> Any:
        """Start one."""
        references = list(map(ray.put, arguments))
        self._kept += references
        return self._of.remote(*references)


def restartable(heals: bool) -> AbstractContextManager[None]:
    """In this block verl makes its reward workers so that Ray starts them again; as ever where the run does not heal.

    See Ray's "Fault tolerance: actors" (docs.ray.io/en/latest/ray-core/fault_tolerance/actors.html).
    """
    if not heals:
        return nullcontext()
    return verl_patches.reward_workers_of(actor_class(RestartableRewardLoopWorker))
