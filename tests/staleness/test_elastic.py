"""Machines come and go: who is added, and who is left in time; the decisions, and verl's balancer on two real nodes."""

import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_m2po.staleness.heal.elastic import Cluster, Elastic, Shape
from verl_m2po.staleness.heal.fleet import Fleet
from verl_m2po.staleness.heal.replicas import nodes_of
from verl_m2po.staleness.restart import shared_folder
from verl_m2po.staleness.restart.shared_folder import machines_that_see

NAMES = st.sampled_from(["a", "b", "c"])


class Replicas:
    """Keeps who is started, and which machines are left."""

    def __init__(self, servers: int) -> None:
        self.fleet = Fleet([f"server {number}" for number in range(servers)], None)
        self.started, self.left = 0, set[str]()

    def add_one(self, vacancy) -> None:
        assert self.fleet.arrive(f"new {self.started}", vacancy)
        self.started += 1

    def leave(self, nodes, reason: str) -> None:
        self.left |= set(nodes)


def turns(elastic: Elastic, count: int) -> None:
    for _ in range(count):
        elastic.look()


@settings(deadline=None)
@given(
    free=st.dictionaries(NAMES, st.fixed_dictionaries({"GPU": st.integers(0, 4), "CPU": st.integers(0, 4)})),
    draining=st.sets(NAMES),
    per_node=st.integers(1, 4),
    nodes=st.integers(1, 3),
    most=st.none() | st.integers(1, 4),
)
def test_replicas_are_added_up_to_the_limit_where_as_many_machines_have_room_that_stay(
    free, draining, per_node, nodes, most
):
    replicas = Replicas(servers=2)
    cluster = SimpleNamespace(free=lambda: free, draining=lambda: draining)
    turns(Elastic(replicas, Shape({"GPU": per_node, "CPU": 1}, nodes), most, cluster), 5)
    room = [node for node in free if node not in draining and free[node]["GPU"] >= per_node and free[node]["CPU"] >= 1]
    assert replicas.started == (max(0, most - 2) if most is not None and len(room) >= nodes else 0)
    assert replicas.left == draining


def test_a_place_that_is_vacant_is_filled_before_one_is_added():
    replicas = Replicas(servers=2)
    cluster = SimpleNamespace(free=lambda: {"a": {"GPU": 8}}, draining=tuple)
    replicas.fleet.lose("server 0")
    turns(Elastic(replicas, Shape({"GPU": 1}, 1), 3, cluster), 5)
    assert replicas.started == 0


def test_the_shape_is_what_a_replica_of_the_start_has():
    group = SimpleNamespace(bundle_specs=[{"CPU": 2.0, "GPU": 1.0}] * 4)
    replica = SimpleNamespace(resource_pool=SimpleNamespace(pgs=[group, group]))
    shape = Shape.of(replica)
    assert shape == Shape({"CPU": 8.0, "GPU": 4.0}, 2)
    assert not shape.fits({"a": {"CPU": 99, "GPU": 8}}) and shape.fits({node: {"CPU": 8, "GPU": 4} for node in "ab"})


@pytest.fixture(scope="module")
def two_nodes():
    """Ray's own cluster of a head and a machine with two devices."""
    import ray
    from ray.cluster_utils import Cluster as Nodes

    # Not on the loopback device as elsewhere: Ray connects to the address of a cluster by the machine's own.
    memory = {"object_store_memory": 100 * 2**20}
    nodes = Nodes(initialize_head=True, connect=True, head_node_args={"include_dashboard": False, **memory})
    nodes.add_node(num_cpus=4, num_gpus=2, **memory)
    nodes.wait_for_nodes()
    yield ray, nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.ray
def test_every_other_machine_is_asked_whether_it_sees_the_checkpoints(two_nodes, tmp_path):
    assert list(machines_that_see(tmp_path).values()) == [True]
    assert list(machines_that_see(tmp_path / "elsewhere").values()) == [False]
    assert list(shared_folder.problems(checkpoints_in(tmp_path))) == []


def checkpoints_in(folder, save_freq: int = 1):
    return OmegaConf.create({"trainer": {"default_local_dir": str(folder), "save_freq": save_freq}})


def test_a_folder_for_checkpoints_that_a_machine_does_not_see_is_refused(tmp_path):
    looked_for = []

    def who_sees(path):
        assert path.exists() and path.parent == tmp_path
        looked_for.append(path)
        return {"10.0.0.1": True, "10.0.0.2": False}

    (problem,) = shared_folder.problems(checkpoints_in(tmp_path), who_sees)
    assert problem.key == "trainer.default_local_dir" and problem.value == str(tmp_path) and problem.is_fatal
    assert "10.0.0.2" in problem.why and "10.0.0.1" not in problem.why and "share" in problem.remedy
    assert not looked_for[0].exists()
    assert list(shared_folder.problems(checkpoints_in(tmp_path, save_freq=-1), who_sees)) == [], "none is written"


@pytest.mark.ray
def test_ray_says_which_devices_are_free_and_which_machine_is_taken_away(two_nodes):
    ray, nodes = two_nodes
    shape = Shape({"CPU": 2, "GPU": 1}, 1)
    cluster = Cluster()
    wait_for(lambda: shape.fits(cluster.free()))
    device = ray.remote(num_gpus=1, num_cpus=2)(SimpleNamespace).remote()
    replica = SimpleNamespace(servers=[device], workers=[device])
    (node,) = nodes_of(replica)
    assert shape.fits(cluster.free()), "one of two devices is free"
    assert not Shape({"GPU": 2}, 1).fits(cluster.free()) and not cluster.draining()
    ray._raylet.GcsClient(address=nodes.address).drain_node(node, PREEMPTION, "the spot price rose", 0)
    wait_for(lambda: set(cluster.draining()) == {node})
    replicas = Replicas(servers=1)
    Elastic(replicas, shape, 2).look()
    assert replicas.left == {node} and replicas.started == 0, "its devices are free, and not for long"


PREEMPTION = 2
"""Ray's `DrainNodeReason`."""


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)
