# pyright: reportAttributeAccessIssue=false
# verl's replicas carry what they are in attributes that their type does not name.
"""The replicas of a run, those that are dead included, and what belongs to each: actors, processes, machines."""

from collections.abc import Collection
from typing import Any

from verl_m2po.staleness.heal import replicas


class Members:
    """Finds a replica by what is known of it. From any thread.

    Args:
        manager: verl's, of the servers that are given work, and of the balancer that gives it.
    """

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._by_name: dict[str, Any] = {}
        self._by_key: dict[str, Any] = {}
        self._children: dict[str, list[replicas.Child]] = {}
        self._nodes: dict[str, frozenset[str]] = {}
        for replica in manager.get_replicas():
            self.add(replica)

    def add(self, replica: Any) -> None:
        """One that is up; asks its actors where they are, and what they have started."""
        name = replica.server_address
        self._children[name], self._nodes[name] = replicas.children_of(replica), replicas.nodes_of(replica)
        self._by_name[name] = replica
        self._by_key |= dict.fromkeys([*replicas.actor_ids(replica), name], replica)

    def named(self, name: str) -> Any:
        """The latest one that serves at the address `name`."""
        return self._by_name[name]

    def owner(self, key: Any) -> Any | None:
        """Whose the actor, or the engine at the address, `key` is; None: nobody's."""
        return self._by_key.get(key if isinstance(key, str) else key._actor_id.hex())

    def has_successor(self, replica: Any) -> bool:
        """Whether a later one has got its address."""
        return self._by_name[replica.server_address] is not replica

    def end(self, replica: Any) -> None:
        """Kill what is left of it."""
        replicas.end(replica, self._children.get(replica.server_address, ()))

    def give_work(self, replica: Any) -> None:
        """verl's manager and its balancer know it from now on."""
        self._manager.rollout_replicas.append(replica)
        self._manager.server_handles.append(replica.server_handle)
        self._manager.server_addresses.append(replica.server_address)
        self._manager.global_load_balancer.add_servers.remote({replica.server_address: replica.server_handle})

    def give_no_work(self, replica: Any) -> None:
        """Neither knows it any more."""
        of = self._manager
        of.global_load_balancer.remove_servers.remote([replica.server_address])
        if replica in of.rollout_replicas:
            place = of.rollout_replicas.index(replica)
            for column in (of.rollout_replicas, of.server_handles, of.server_addresses):
                del column[place]

    def on(self, nodes: Collection[str]) -> list[Any]:
        """Those of which a part is on one of `nodes`, Ray's ids."""
        return [replica for name, replica in list(self._by_name.items()) if self._nodes[name].intersection(nodes)]
