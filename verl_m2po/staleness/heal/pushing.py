# pyright: reportIncompatibleMethodOverride=false
# verl's method is a coroutine that its decorator runs where nobody awaits it.
"""verl's push of the weights, with a gate: a server that has not got them is given no work, nor waited for."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from ray.exceptions import RayTaskError
from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

from verl_m2po.patches import verl as verl_patches
from verl_m2po.staleness.heal import fleet, replicas

logger = logging.getLogger(__name__)

HAND_BACK_EVERY_S = 0.1
"""While servers close for a push."""


async def _hand_back(server: Any) -> None:
    if waiting := await server.__ray_call__.remote(verl_patches.waiting_requests):
        await server.__ray_call__.remote(verl_patches.cancel, waiting)


class Attendance(Protocol):
    """Who takes part in a push, as `healing.Healing` knows it."""

    def takes_part(self, replica: Any) -> bool:
        """Whether the replica is not lost."""
        ...

    def lose(self, replica: Any, reason: str) -> None:
        """The replica takes part no more."""
        ...

    def explain(self, attempted: Sequence[Any], error: Exception) -> bool:
        """Whether one of those that a push with this `error` went to has died; whom it left blocked is lost, too."""
        ...

    def admit(self, replicas: Sequence[Any]) -> None:
        """These have the present weights, and report them."""
        ...


class GatedCheckpointManager(CheckpointEngineManager):
    """Pushes to the replicas that are there, asks each which version it serves, and lets only those generate that do.

    Args:
        of: verl's, whose configuration and actor this takes.
        replicas: to push to.
        attendance: who is lost, and who joins.
    """

    def __init__(self, of: CheckpointEngineManager, replicas: list[Any], attendance: Attendance) -> None:
        super().__init__(config=of.config, actor_wg=of.actor_wg, replicas=replicas)
        self._attendance = attendance
        self._version = 0

    def update_weights(self, global_steps: int) -> dict[str, Any]:
        """Push weight version `global_steps`; a push in which a replica dies is made again without it.

        Returns:
            The sender's metrics; none if no replica is left, as the next one to join is pushed to on its own.
        """
        self._version = global_steps
        while self._drop_lost():
            attempted = list(self.replicas)
            try:
                metrics: Any = CheckpointEngineManager.update_weights(self, global_steps)
            except Exception as error:
                if not self._attendance.explain(attempted, error):
                    raise
                logger.warning("the push of weight version %d is made again: %s", global_steps, error)
                continue
            self._drop_lost()
            self._attendance.admit(self.replicas)
            return metrics or {}
        logger.warning("weight version %d is pushed to no rollout server: none is left", global_steps)
        return {}

    def _drop_lost(self) -> list[Any]:
        self.replicas = [replica for replica in self.replicas if self._attendance.takes_part(replica)]
        return self.replicas

    @auto_await
    async def abort_replicas(self, reject_request: bool = False) -> None:
        """As verl's, and without a wait for what a server has in its queue: it is handed back, and parked."""
        closing = asyncio.ensure_future(CheckpointEngineManager.abort_replicas(self, reject_request=reject_request))
        while not (await asyncio.wait({closing}, timeout=HAND_BACK_EVERY_S))[0]:
            # A server that is gone says so to `closing`.
            handing_back = [_hand_back(replica.server_handle) for replica in self.replicas]
            for outcome in await asyncio.gather(*handing_back, return_exceptions=True):
                if isinstance(outcome, RayTaskError):
                    raise outcome
        await closing

    @auto_await
    async def resume_generation_replicas(self) -> None:
        """As verl's, for those that pass the gate: before the first request of the new weights is served."""
        reported = await replicas.served_versions(self.replicas)
        refused = fleet.behind(reported, self._version)
        for replica in self.replicas:
            if (reason := refused.get(replica.server_address)) is not None:
                self._attendance.lose(replica, f"after the push of weight version {self._version} {reason}")
        await asyncio.gather(*[replica.resume_generation() for replica in self._drop_lost()])
