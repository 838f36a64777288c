"""Rollout servers that die under a run are left at once and replaced; real actors and verl's balancer, no engines."""

import asyncio
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from verl.checkpoint_engine import CheckpointEngineManager
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from verl_m2po.staleness.heal import healing
from verl_m2po.staleness.heal.healing import Healing
from verl_m2po.staleness.watch.liveness import Watch, WorkerDied

pytestmark = pytest.mark.ray

WITHIN_S = 60.0


class Actor:
    """verl's worker group of the actor, reduced to the name of the weights that it has."""

    def __init__(self) -> None:
        self.weights, self._saved = 0, {}

    def save_model_to_cpu(self, name) -> None:
        self._saved[name] = self.weights

    def restore_model_from_cpu(self, name) -> None:
        self.weights = self._saved[name]

    def clear_cpu_model(self, name) -> None:
        del self._saved[name]


class Fakes:
    """verl's managers over servers that are actors without an engine."""

    def __init__(self, ray, monkeypatch, servers: int = 2, start_fails: bool = False) -> None:
        @ray.remote(num_cpus=0)
        class Count:
            def __init__(self) -> None:
                self.all = 0

            def append(self, one: int) -> None:
                self.all += one

            def get(self) -> int:
                return self.all

        self._count = handed_back = Count.remote()

        @ray.remote(num_cpus=0)
        class Server:
            global_steps = None

            async def load(self, weights: int, version: int) -> None:
                self.weights, self.global_steps = weights, version

            async def collective_rpc(self, method: str) -> None: ...

            async def resume_generation(self) -> None: ...

            async def abort_all_requests(self) -> None:
                handed_back.append.remote(1)

            async def held(self):
                return self.weights, self.global_steps

        class Replica:
            def __init__(self, replica_rank: int, **_) -> None:
                self.replica_rank, self.server_address = replica_rank, f"127.0.0.1:{replica_rank + 1}"
                self.servers, self.workers, self.resource_pool = [], [], None

            async def init_standalone(self) -> None:
                if start_fails and self.replica_rank >= servers:
                    raise ValueError("no device is free")
                self.servers = [Server.remote()]
                self.server_handle = self.servers[0]
                await self.server_handle.collective_rpc.remote("")

            async def resume_generation(self) -> None:
                await self.server_handle.resume_generation.remote()

            async def abort_all_requests(self, reject_request: bool) -> None:
                await self.server_handle.abort_all_requests.remote()

        monkeypatch.setattr(healing, "RETRY_S", 0.2)
        monkeypatch.setattr(healing, "HAND_OVER_S", 0.2)
        monkeypatch.setattr(CheckpointEngineManager, "__init__", self._init)
        monkeypatch.setattr(CheckpointEngineManager, "update_weights", self._push)
        self._ray, self.actor, self.watch = ray, Actor(), Watch(ask_every_s=0.2, unwind_s=0.5, exit_s=None)
        self.replicas = [Replica(rank) for rank in range(servers)]
        for replica in self.replicas:
            asyncio.run(replica.init_standalone())
        handles = {replica.server_address: replica.server_handle for replica in self.replicas}
        self.balancer = ray.remote(GlobalRequestLoadBalancer).remote(servers=handles)
        self.manager = SimpleNamespace(
            rollout_replicas=list(self.replicas),
            server_handles=list(handles.values()),
            server_addresses=list(handles),
            global_load_balancer=self.balancer,
            rollout_replica_class=Replica,
            rollout_config=SimpleNamespace(n_gpus_per_node=1),
            model_config=None,
        )
        self.manager.get_replicas = lambda: self.manager.rollout_replicas
        self.watch.add("rollout server", list(handles.values()))

    @staticmethod
    def _init(manager, config, actor_wg, replicas) -> None:
        manager.config, manager.actor_wg, manager.replicas = config, actor_wg, replicas

    def _push(self, manager, version: int) -> dict:
        servers = [replica.server_handle for replica in manager.replicas]
        self._ray.get([server.load.remote(self.actor.weights, version) for server in servers])
        manager.resume_generation_replicas()
        return {}

    def handed_back(self) -> int:
        """Servers that were asked to give back what they generate."""
        return self._ray.get(self._count.get.remote())

    def heal(self, **settings) -> Healing:
        defaults = {"heals": True, "replica_timeout_s": None, "keeps_weights": True}
        pushes = SimpleNamespace(config=None, actor_wg=self.actor)
        return Healing(self.manager, pushes, self.watch, **(defaults | settings))

    def kill(self, index: int) -> None:
        self._ray.kill(self.replicas[index].server_handle)

    def balanced(self) -> set[str]:
        return set(self._ray.get(self.balancer.get_all_servers.remote()))

    def held(self) -> dict[str, tuple[int, int]]:
        """Weights and version of every server in the balancer."""
        replicas = self.manager.get_replicas()
        return {each.server_address: tuple(self._ray.get(each.server_handle.held.remote())) for each in replicas}


def wait_for(what, tend=lambda: None) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline
        tend()
        time.sleep(0.05)


def tend(of: Healing, version: int):
    return lambda: of.tend(version, lambda _: nullcontext())


def test_a_dead_server_leaves_at_once_and_another_joins_with_the_present_weights(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch)
    of = fakes.heal()
    fakes.actor.weights = 7
    of.push(lambda: of.pushes.update_weights(7))
    with fakes.watch.guard():
        fakes.kill(0)
        wait_for(lambda: fakes.balanced() == {"127.0.0.1:2"})
        wait_for(lambda: of.fleet.joining)
        assert fakes.balanced() == {"127.0.0.1:2"}, "it has no weights yet"
        wait_for(lambda: len(of.fleet.serving) == 2, tend(of, 7))
        assert fakes.balanced() == {"127.0.0.1:2", "127.0.0.1:3"} == set(fakes.held())
        assert set(fakes.held().values()) == {(7, 7)}
        fakes.actor.weights = 8
        of.push(lambda: of.pushes.update_weights(8))
        assert set(fakes.held().values()) == {(8, 8)}, "it takes part in the next push"
    changes, metrics = of.take_changes()
    assert len(changes.lost_at) == len(changes.joined_at) == 1 and changes.lost_at < changes.joined_at
    names = ("staleness/replicas", "staleness/replicas_lost", "staleness/replicas_joined")
    assert [metrics[name] for name in names] == [2, 1, 1]


def test_one_that_joins_while_the_actor_is_trained_gets_the_weights_that_the_others_hold(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch, servers=1)
    of = fakes.heal()
    fakes.actor.weights = 7
    of.push(lambda: of.pushes.update_weights(7))
    with fakes.watch.guard():
        of.held.before_update()
        fakes.actor.weights = 75  # after one update of two
        of.held.before_update()
        fakes.kill(0)
        wait_for(lambda: not fakes.balanced())
        wait_for(lambda: len(of.fleet.serving) == 1, tend(of, 7))
    assert fakes.held() == {"127.0.0.1:2": (7, 7)}
    assert fakes.actor.weights == 75, "the actor goes on where it was"


def test_with_no_server_left_and_its_weights_gone_the_run_ends(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch, servers=1)
    of = fakes.heal(keeps_weights=False)
    of.push(lambda: of.pushes.update_weights(0))
    of.held.before_update()
    with pytest.raises(WorkerDied, match="keep_pushed_weights=true"), fakes.watch.guard():
        fakes.kill(0)
        wait_for(lambda: False, tend(of, 0))


def test_a_server_that_cannot_be_replaced_in_time_is_given_up(cluster, monkeypatch, caplog):
    fakes = Fakes(cluster, monkeypatch, start_fails=True)
    of = fakes.heal(replica_timeout_s=1.0)
    of.push(lambda: of.pushes.update_weights(0))
    with fakes.watch.guard():
        fakes.kill(1)
        wait_for(lambda: of.fleet.vacant)
        wait_for(lambda: not of.fleet.vacant, tend(of, 0))
    assert of.fleet.serving == {"127.0.0.1:1"} == fakes.balanced()
    assert "no device is free" in caplog.text and "the run goes on with 1" in caplog.text


def test_a_server_that_dies_in_a_push_is_left_and_its_push_made_again(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch, start_fails=True)
    of = fakes.heal()
    with fakes.watch.guard():
        fakes.kill(1)  # Ray fails the call of the push, the watch may not know yet
        of.push(lambda: of.pushes.update_weights(3))
        assert fakes.held() == {"127.0.0.1:1": (0, 3)}


def test_a_machine_that_is_taken_away_is_left_while_its_servers_still_answer(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch)
    of = fakes.heal()
    of.push(lambda: of.pushes.update_weights(4))
    node = cluster.get_runtime_context().get_node_id()
    with fakes.watch.guard():
        of.leave(["another machine"], "it is drained")
        assert len(of.fleet.serving) == 2
        of.leave([node], "it is drained")
        assert not of.fleet.serving and not fakes.balanced(), "no more work for them"
        wait_for(lambda: fakes.handed_back() == 2)
        wait_for(lambda: len(of.fleet.serving) == 2, tend(of, 4))
    assert fakes.balanced() == {"127.0.0.1:3", "127.0.0.1:4"} and set(fakes.held().values()) == {(0, 4)}


def test_one_more_server_joins_and_where_it_cannot_start_it_is_not_tried_for_ever(cluster, monkeypatch):
    for start_fails, served in ((False, 2), (True, 1)):
        fakes = Fakes(cluster, monkeypatch, servers=1, start_fails=start_fails)
        of = fakes.heal()
        of.push(lambda of=of: of.pushes.update_weights(4))
        with fakes.watch.guard():
            of.add_one(of.fleet.widen(2))
            wait_for(lambda of=of: not of.fleet.vacant and not of.fleet.joining, tend(of, 4))
        assert len(of.fleet.serving) == len(fakes.balanced()) == served


def test_where_nothing_heals_a_death_ends_the_run(cluster, monkeypatch):
    fakes = Fakes(cluster, monkeypatch)
    of = fakes.heal(heals=False)
    of.push(lambda: of.pushes.update_weights(0))
    with pytest.raises(WorkerDied, match="rollout server 0 of 2 died"), fakes.watch.guard():
        fakes.kill(0)
        wait_for(lambda: False, tend(of, 0))
    assert not of.fleet.vacant and len(of.fleet.serving) == 2
