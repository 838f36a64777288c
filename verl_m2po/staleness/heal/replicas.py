# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# verl's replicas and Ray's handles carry what they are in attributes that their types do not name.
"""What is done to verl's replicas through Ray: started, asked, ended."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
"""How long a server may take to say what it serves, or its engine that it answers at all."""


@dataclass(frozen=True)
class Child:
    """A process that a server has started, its engine for example.

    Args:
        node: Ray's id of its machine.
        pid: there.
        created_at: seconds since the epoch; tells it from a later process of the same number.
    """

    node: str
    pid: int
    created_at: float


def actors_of(replica: Any) -> list[Any]:
    """Every actor of a replica: its servers, and the workers that receive its weights."""
    return [*replica.servers, *replica.workers]


def actor_ids(replica: Any) -> set[str]:
    """The ids of its actors."""
    return {actor._actor_id.hex() for actor in actors_of(replica)}


def _node(_actor: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def nodes_of(replica: Any) -> frozenset[str]:
    """Ray's ids of the machines that its actors are on, as far as they say so."""
    return frozenset(_answers([actor.__ray_call__.remote(_node) for actor in actors_of(replica)]))


def _answers(asked: list[Any]) -> list[Any]:
    """Of those that answer at all."""
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = []
    for answer in answered:
        with suppress(ray.exceptions.RayError):
            found.append(ray.get(answer))
    return found


def _children(_server: Any) -> list[Child]:
    node = ray.get_runtime_context().get_node_id()
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found.append(Child(node, process.pid, process.create_time()))
    return found


def children_of(replica: Any) -> list[Child]:
    """The processes that the servers of a replica have started by now; they may outlive it, and keep its devices."""
    answers = _answers([server.__ray_call__.remote(_children) for server in replica.servers])
    return [child for answer in answers for child in answer]


def _kill(children: Sequence[Child]) -> None:
    for child in children:
        with suppress(psutil.Error):
            process = psutil.Process(child.pid)
            if process.create_time() == child.created_at:
                process.kill()


def end(replica: Any, children: Iterable[Child]) -> None:
    """Kill what is left of a replica, and free its devices. Waits for nothing."""
    for actor in actors_of(replica):
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor, no_restart=True)
    by_node: dict[str, list[Child]] = {}
    for child in children:
        by_node.setdefault(child.node, []).append(child)
    for node, of_node in by_node.items():
        # Soft: a machine that is gone has taken its processes with it.
        where = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
        ray.remote(num_cpus=0)(_kill).options(scheduling_strategy=where).remote(of_node)
    for group in (replica.resource_pool.pgs or []) if replica.resource_pool is not None else []:
        remove_placement_group(group)


class Maker:
    """Makes replicas like those that verl has started, none of them started yet.

    Args:
        manager: verl's, of the servers.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        # Never one that was used: Ray's names and sockets carry it, and those of the dead may still be there.
        self._ranks = itertools.count(max(replica.replica_rank for replica in manager.get_replicas()) + 1)

    def __call__(self) -> Any:
        """The next one."""
        config = self._manager.rollout_config
        return self._manager.rollout_replica_class(
            replica_rank=next(self._ranks),
            config=config,
            model_config=self._manager.model_config,
            gpus_per_node=config.n_gpus_per_node,
        )


def launch(make: Callable[[], Any]) -> Any:
    """Start a replica on devices of its own; takes as long as loading a model.

    Args:
        make: returns verl's replica, not started.

    Raises:
        Exception: it did not start; what there was of it is ended.
    """
    replica = make()
    try:
        asyncio.run(replica.init_standalone())
    except BaseException:
        end(replica, ())
        raise
    return replica


def _served_version(server: Any) -> int | None:
    return getattr(server, "global_steps", None)


async def _version(replica: Any) -> int | None:
    try:
        return await asyncio.wait_for(replica.servers[0].__ray_call__.remote(_served_version), ANSWER_S)
    except (ray.exceptions.RayError, TimeoutError, asyncio.TimeoutError):
        return None


async def served_versions(replicas: Sequence[Any]) -> dict[str, int | None]:
    """By address, the weight version that each server says it serves; None: it does not say."""
    versions = await asyncio.gather(*map(_version, replicas))
    return {replica.server_address: version for replica, version in zip(replicas, versions, strict=True)}


def silent_engines(replicas: Sequence[Any]) -> list[Any]:
    """Those whose engine does not answer: a push that ended in the middle leaves a receiver that waits for ever."""
    # Of vLLM's servers; others cannot be asked, and the push that is made again will tell.
    askable = [each for each in replicas if hasattr(each.servers[0], "collective_rpc")]
    asked = {each.servers[0].collective_rpc.remote("check_health"): each for each in askable}
    answered, unanswered = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    silent = [asked[one] for one in unanswered]
    for one in answered:
        try:
            ray.get(one)
        except ray.exceptions.RayError:
            silent.append(asked[one])
    return silent
