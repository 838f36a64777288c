# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# verl asks the same of Ray, in the same place.
"""Machines come and go: a replica is added where devices are free, and left before its machine is taken away."""

import logging
import threading
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from verl_m2po.staleness.heal.fleet import Fleet, Vacancy

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


@dataclass(frozen=True)
class Shape:
    """What a replica takes.

    Args:
        per_node: Ray's resources on each machine.
        nodes: machines.
    """

    per_node: Mapping[str, float]
    nodes: int

    @classmethod
    def of(cls, replica: Any) -> "Shape":
        """That of one that is up, on machines of its own."""
        groups = replica.resource_pool.pgs
        per_node: Counter[str] = Counter()
        for bundle in groups[0].bundle_specs:
            per_node.update(bundle)
        return cls(per_node, len(groups))

    def fits(self, free: Mapping[str, Mapping[str, float]]) -> bool:
        """Whether enough machines have that much; `free`: by machine, what Ray says is free there."""
        enough = [node for node, has in free.items() if all(has.get(r, 0) >= n for r, n in self.per_node.items())]
        return len(enough) >= self.nodes


class Cluster:
    """What Ray knows of the machines."""

    def free(self) -> dict[str, dict[str, float]]:
        """By the id of a machine, its free resources."""
        return ray._private.state.available_resources_per_node()

    def draining(self) -> Collection[str]:
        """Ids of the machines that are about to be taken away, as `ray drain-node` and spot notices say."""
        return ray._private.state.state.get_draining_nodes().keys()


class Replicas(Protocol):
    """Who starts replicas and parts with them, `healing.Healing`."""

    fleet: Fleet

    def add_one(self, vacancy: Vacancy) -> None:
        """Try once to fill a place that nobody had; in the background."""
        ...

    def leave(self, nodes: Collection[str], reason: str) -> None:
        """Part with the replicas on `nodes`, while they still answer; in the background."""
        ...


class Elastic:
    """Follows the cluster.

    Args:
        replicas: see `Replicas`.
        shape: of a replica.
        most: replicas at a time; None adds none.
        cluster: what Ray knows.
    """

    def __init__(self, replicas: Replicas, shape: Shape, most: int | None, cluster: Any = None) -> None:
        self._replicas, self._shape, self._most = replicas, shape, most
        self._cluster = Cluster() if cluster is None else cluster

    def begin(self) -> None:
        """Look again and again, to the end of this process."""
        threading.Thread(target=self._watch, name="elastic", daemon=True).start()

    def _watch(self) -> None:
        never = threading.Event()
        while not never.wait(LOOK_EVERY_S):
            try:
                self.look()
            except (ray.exceptions.RayError, RuntimeError) as error:
                logger.warning("Ray does not say which machines there are: %s", error)

    def look(self) -> None:
        """Leave the machines that are taken away, and add a replica where there is room."""
        draining = self._cluster.draining()
        if draining:
            self._replicas.leave(draining, "its machine is being drained")
        if self._most is None:
            return
        free = {node: has for node, has in self._cluster.free().items() if node not in draining}
        if self._shape.fits(free) and (vacancy := self._replicas.fleet.widen(self._most)) is not None:
            logger.warning("devices are free: one more rollout server is started on them")
            self._replicas.add_one(vacancy)
