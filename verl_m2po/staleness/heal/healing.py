# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportUnusedCoroutine=false
# verl's managers and replicas carry what they are in attributes that their types do not name, and its coroutines run
# where nobody awaits them.
"""A rollout server dies and the run goes on: who is left, who joins, and with which weights.

The watching thread learns of a death, ends what is left of the replica and lets a thread start another one. Weights are
pushed from the main thread alone, where nothing else uses the actor: with the push at the end of a trainer step, or
while the trainer waits for rollouts; then the actor may have made updates, see `HeldWeights`.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import ray
from omegaconf import DictConfig

from verl_m2po.staleness.checks.healing import why_not
from verl_m2po.staleness.config import SeparateConfig, load_mode_config
from verl_m2po.staleness.heal import replicas
from verl_m2po.staleness.heal.elastic import Elastic, Shape
from verl_m2po.staleness.heal.fleet import Fleet, Vacancy
from verl_m2po.staleness.heal.held import HeldWeights
from verl_m2po.staleness.heal.members import Members
from verl_m2po.staleness.heal.pushing import GatedCheckpointManager
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.watch.liveness import Watch, WorkerDied

logger = logging.getLogger(__name__)

RETRY_S = 5.0
"""Between two attempts at starting a server: Ray learns late that devices are free."""

HAND_OVER_S = 1.0
"""For what a server has handed back to arrive, before the server is ended."""


class Healing:
    """The replicas of a run on separate devices.

    Args:
        manager: verl's manager of the servers.
        pushes: verl's manager of the pushes to them.
        watch: told of the new, and tells of the dead.
        heals: false: the run ends with a server that dies, or that does not serve what it should.
        replica_timeout_s: see `Fleet`.
        keeps_weights: keep a copy of the weights that the rollout holds while the actor makes others.
    """

    def __init__(
        self,
        manager: Any,
        pushes: Any,
        watch: Watch,
        *,
        heals: bool,
        replica_timeout_s: float | None,
        keeps_weights: bool,
    ) -> None:
        self.heals = heals
        self._watch = watch
        first = list(manager.get_replicas())
        self._members, self._make = Members(manager), replicas.Maker(manager)
        self.fleet = Fleet([replica.server_address for replica in first], replica_timeout_s)
        self.pushes = GatedCheckpointManager(pushes, first, self)
        self.held = HeldWeights(pushes.actor_wg, heals and keeps_weights)
        watch.heal_with(self.take_care)

    @classmethod
    def of(cls, config: DictConfig, manager: Any, pushes: Any, watch: Watch) -> "Healing":
        """Of a run in a separate mode."""
        settings = load_mode_config(config, config.trainer.v1.trainer_mode)
        assert isinstance(settings, SeparateConfig)
        healing = cls(
            manager,
            pushes,
            watch,
            heals=settings.heal and why_not(config) is None,
            replica_timeout_s=settings.replica_timeout_s,
            keeps_weights=settings.keep_pushed_weights,
        )
        if healing.heals:
            Elastic(healing, Shape.of(manager.get_replicas()[0]), settings.max_replicas).begin()
        return healing

    def take_care(self, key: Any, reason: str) -> bool:
        """The actor, or the engine at the address, `key` is dead. Whether that is one of ours, and the run goes on."""
        replica = self._members.owner(key)
        if replica is None or not self.heals:
            return False
        self._lose(replica, reason)
        return True

    def lose(self, replica: Any, reason: str) -> None:
        """See `pushing.Attendance`.

        Raises:
            WorkerDied: the run does not heal.
        """
        if not self.heals:
            raise WorkerDied(f"rollout server {replica.server_address} cannot be given work: {reason}")
        self._lose(replica, reason)

    def takes_part(self, replica: Any) -> bool:
        """See `pushing.Attendance`."""
        return self.fleet.has(replica.server_address) and not self._members.has_successor(replica)

    def _lose(self, replica: Any, reason: str) -> None:
        if (vacancy := self._part_with(replica, reason)) is not None:
            self._members.end(replica)
            _in_background(self._fill, vacancy)

    def leave(self, nodes: Collection[str], reason: str) -> None:
        """See `elastic.Replicas`."""
        for replica in self._members.on(nodes):
            if (vacancy := self._part_with(replica, reason)) is not None:
                _in_background(self._empty, replica)
                _in_background(self._fill, vacancy)

    def _empty(self, replica: Any) -> None:
        """Let what it generates go on elsewhere, with the tokens that there are, and end it."""
        with suppress(ray.exceptions.RayError):  # it is gone already: what it had begins again
            GatedCheckpointManager(self.pushes, [replica], self).abort_replicas()
        time.sleep(HAND_OVER_S)
        self._members.end(replica)

    def _part_with(self, replica: Any, reason: str) -> Vacancy | None:
        """It gets no work any more. Its place; None if it takes no part."""
        name = replica.server_address
        vacancy = None if self._members.has_successor(replica) else self.fleet.lose(name)
        if vacancy is None:
            return None
        logger.warning(
            "rollout server %s is lost (%s): its work moves to the %d that are left, another one is started in its "
            "place",
            *(name, reason.strip().splitlines()[0], len(self.fleet.serving)),
        )
        self._members.give_no_work(replica)
        self._watch.drop_engine(name)
        return vacancy

    def add_one(self, vacancy: Vacancy) -> None:
        """See `elastic.Replicas`."""
        _in_background(self._fill, vacancy, once=True)

    def _fill(self, vacancy: Vacancy, once: bool = False) -> None:
        """Start servers until one is up, or its place is given up."""
        said = ""
        while self.fleet.awaits(vacancy):
            try:
                self._receive(replicas.launch(self._make), vacancy)
            except Exception as error:
                if said != (said := str(error)):
                    logger.warning("a rollout server did not start%s: %s", "" if once else ", it is tried again", said)
                if once:
                    self.fleet.abandon(vacancy)
                time.sleep(RETRY_S)

    def _receive(self, replica: Any, vacancy: Vacancy) -> None:
        name = replica.server_address
        self._members.add(replica)
        if not self.fleet.arrive(name, vacancy):
            self._members.end(replica)
            return
        self._watch.add(f"rollout server at {name}", replica.servers)
        self._watch.add(f"rollout worker of {name}", replica.workers)
        self._watch.add_engines("rollout engine", [name])
        logger.info("rollout server %s is up, and waits for the present weights", name)

    def _all_take_part(self, those: Sequence[Any]) -> bool:
        return all(map(self.takes_part, those))

    def explain(self, attempted: Sequence[Any], error: Exception) -> bool:
        """See `pushing.Attendance`."""
        if not self.heals or not self._watch.find_cause_until(lambda: not self._all_take_part(attempted), error):
            return False
        for replica in replicas.silent_engines([each for each in attempted if self.takes_part(each)]):
            self.lose(replica, "its engine waits for the rest of a push that a death has interrupted")
        return True

    def admit(self, those: Sequence[Any]) -> None:
        """See `pushing.Attendance`."""
        for replica in those:
            name = replica.server_address
            if self.fleet.admit(name):
                self._members.give_work(replica)
                logger.warning("rollout server %s joins: %d serve now", name, len(self.fleet.serving))

    def push(self, push: Callable[[], Any]) -> Any:
        """Push the actor's weights with `push`, verl's, to all, and to those that wait to join."""
        waiting = [replica for replica in self._joining() if replica not in self.pushes.replicas]
        self.pushes.add_replicas(waiting)
        result = push()
        self.held.are_pushed()
        return result

    def _joining(self) -> list[Any]:
        return list(map(self._members.named, self.fleet.joining))

    def tend(self, version: int, limit: Callable[[int], AbstractContextManager[None]]) -> None:
        """Called while the trainer waits: those that wait to join get `version`, the weights that the others hold.

        Args:
            limit: the time limit of a push.

        Raises:
            WorkerDied: no server is left, and these weights are nowhere.
        """
        if given_up := self.fleet.give_up():
            logger.warning(
                "%d rollout servers are not replaced within replica_timeout_s: the run goes on with %d",
                *(given_up, len(self.fleet.serving)),
            )
        joining = self._joining()
        if not joining:
            return
        if not self.held.are_at_hand:
            if not self.fleet.serving:
                raise WorkerDied(
                    f"all rollout servers died while the actor was trained, and weight version {version}, which the "
                    "trainer still waits for rollouts of, is gone. keep_pushed_weights=true keeps it"
                )
            return  # the next push comes by itself
        alone = GatedCheckpointManager(self.pushes, joining, self)
        with limit(version), self.held.in_actor():
            alone.update_weights(version)
        self.pushes.add_replicas(alone.replicas)

    def take_changes(self) -> tuple[events.ServersChanged, dict[str, float]]:
        """What has happened to the servers since the last call, as an event and as metrics of the trainer step."""
        changes = self.fleet.take_changes()
        metrics: dict[str, float] = {
            "staleness/replicas": len(self.fleet.serving),
            "staleness/replicas_lost": len(changes.lost_at),
            "staleness/replicas_joined": len(changes.joined_at),
        }
        return events.ServersChanged(tuple(changes.lost_at), tuple(changes.joined_at)), metrics


def _in_background(work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    threading.Thread(target=work, args=args, kwargs=kwargs, name=work.__name__, daemon=True).start()
