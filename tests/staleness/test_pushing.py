"""A push in which a server dies, or that a server misses: who generates afterwards, and who is given up."""

import asyncio
import time
from operator import attrgetter
from types import SimpleNamespace

import pytest
from verl.checkpoint_engine import CheckpointEngineManager

from verl_m2po.patches import verl as verl_patches
from verl_m2po.staleness.heal.lent import Lent
from verl_m2po.staleness.heal.pushing import GatedCheckpointManager
from verl_m2po.staleness.watch.liveness import WorkerDied


class Replica:
    """One server; `misses` are weight versions that do not reach it."""

    def __init__(self, name: str, misses=(), dies_in=()) -> None:
        self.server_address, self.misses, self.dies_in = name, misses, dies_in
        self.global_steps: int | None = None
        self.generates = False
        self.servers = [SimpleNamespace(__ray_call__=SimpleNamespace(remote=self._begin))]

    def _begin(self, what, *args):
        return asyncio.ensure_future(self._call(what, *args))

    async def _call(self, what, *args):
        return what(self, *args)

    async def resume_generation(self) -> None:
        self.generates = True


class Run:
    """Attendance, and verl's push reduced to what it does to the replicas."""

    def __init__(self, monkeypatch, *replicas: Replica, explains: bool = True) -> None:
        self.lost: dict[str, str] = {}
        self.admitted: list[list[str]] = []
        self.explains = explains
        monkeypatch.setattr(CheckpointEngineManager, "__init__", self._init)
        monkeypatch.setattr(CheckpointEngineManager, "update_weights", self._push)
        of = SimpleNamespace(config=None, actor_wg=None)
        self.manager = GatedCheckpointManager(of, list(replicas), self)

    @staticmethod
    def _init(manager, config, actor_wg, replicas) -> None:
        manager.replicas = replicas

    def _push(self, manager, version: int) -> dict:
        for replica in manager.replicas:
            replica.generates = False
        for replica in manager.replicas:
            if version in replica.dies_in:
                self.dead = replica
                raise ConnectionError("a receiver is gone")
            if version not in replica.misses:
                replica.global_steps = version
        manager.resume_generation_replicas()
        return {"sent": len(manager.replicas)}

    def takes_part(self, replica) -> bool:
        return replica.server_address not in self.lost

    def lose(self, replica, reason: str) -> None:
        self.lost[replica.server_address] = reason

    def explain(self, attempted, error) -> bool:
        if self.explains:
            self.lose(self.dead, "died")
        return self.explains

    def admit(self, replicas) -> None:
        self.admitted.append([replica.server_address for replica in replicas])


def test_a_server_that_misses_a_push_generates_nothing_with_its_old_weights(monkeypatch):
    good, late = Replica("good"), Replica("late", misses=(2,))
    run = Run(monkeypatch, good, late)
    run.manager.update_weights(1)
    assert good.generates and late.generates and not run.lost
    run.manager.update_weights(2)
    assert good.generates and not late.generates
    assert "weight version 1" in run.lost["late"] and "weight version 2" in run.lost["late"]
    assert run.admitted == [["good", "late"], ["good"]]


@pytest.mark.parametrize("misses", [(0,), (0, 1)])
def test_a_server_that_has_never_had_weights_generates_nothing(monkeypatch, misses):
    new = Replica("new", misses=misses)
    run = Run(monkeypatch, new)
    run.manager.update_weights(0)
    assert not new.generates and "does not say" in run.lost["new"] and run.admitted == [[]]


def test_a_push_in_which_a_server_dies_is_made_again_to_the_others(monkeypatch):
    replicas = [Replica("a"), Replica("b", dies_in=(3,)), Replica("c")]
    run = Run(monkeypatch, *replicas)
    assert run.manager.update_weights(3) == {"sent": 2}
    assert [replica.generates for replica in replicas] == [True, False, True]
    assert run.lost == {"b": "died"} and run.admitted == [["a", "c"]]


def test_without_a_server_there_is_nothing_to_push_to(monkeypatch):
    run = Run(monkeypatch, Replica("a", dies_in=(3,)))
    assert run.manager.update_weights(3) == {}
    assert run.manager.update_weights(4) == {} and run.admitted == []


def test_an_error_that_no_death_explains_stays_an_error(monkeypatch):
    run = Run(monkeypatch, Replica("a", dies_in=(3,)), explains=False)
    with pytest.raises(ConnectionError):
        run.manager.update_weights(3)


def test_a_lent_server_that_does_not_serve_the_present_weights_ends_the_run(monkeypatch):
    """It shares its processes with the trainer, so that nothing can take its place."""
    good, late = Replica("good"), Replica("late", misses=(2,))
    manager = Run(monkeypatch, good, late).manager
    manager._attendance = Lent()
    manager.update_weights(1)
    assert good.generates and late.generates
    with pytest.raises(WorkerDied, match=r"late on the training devices: .*weight version 1"):
        manager.update_weights(2)
    assert not good.generates and not late.generates


@pytest.fixture
def closing(cluster):
    """verl's server and vLLM's engine in it as far as a push waits for them, and none of whose requests has a token.

    In a process of Ray's, where what we call runs in another thread than its requests.
    """

    class Closing:
        def __init__(self) -> None:
            self.engine = self
            self.output_handler: asyncio.Task | None = None
            self.output_processor = SimpleNamespace(request_states={})
            self._submission_paused, self._admitting = False, 0

        async def generate(self, request: str) -> str:
            self.output_handler = self.output_handler or asyncio.create_task(asyncio.Event().wait())
            state = SimpleNamespace(is_prefilling=True, external_req_id=request, aborted=asyncio.Event())
            self.output_processor.request_states[f"{request}-of vLLM"] = state
            self._admitting += 1
            await state.aborted.wait()
            self._admitting -= 1
            return request

        async def abort(self, requests: list[str]) -> None:
            for request in requests:
                if state := self.output_processor.request_states.pop(f"{request}-of vLLM", None):
                    state.aborted.set()

        async def queued(self) -> int:
            return self._admitting

        async def close(self) -> None:
            self._submission_paused = True
            while self._admitting:
                await asyncio.sleep(0.01)

    return cluster.remote(max_concurrency=64)(Closing).remote()


def abort_replicas(self, reject_request: bool = False):
    return asyncio.wait_for(self.replicas[0].server_handle.close.remote(), 60)


@pytest.mark.ray
@pytest.mark.parametrize("queued", [0, 40])
def test_a_push_does_not_wait_for_what_a_server_has_in_its_queue(cluster, closing, monkeypatch, queued):
    monkeypatch.setattr(CheckpointEngineManager, "abort_replicas", abort_replicas)
    requests = [closing.generate.remote(str(number)) for number in range(queued)]
    while cluster.get(closing.queued.remote()) < queued:
        time.sleep(0.05)
    run = Run(monkeypatch, SimpleNamespace(server_handle=closing))
    run.manager.abort_replicas()
    assert cluster.get(requests, timeout=60) == [str(number) for number in range(queued)]


@pytest.mark.ray
def test_a_server_that_cannot_hand_back_says_why(cluster, closing, monkeypatch):
    monkeypatch.setattr(CheckpointEngineManager, "abort_replicas", abort_replicas)
    monkeypatch.setattr(verl_patches, "waiting_requests", attrgetter("no_such_thing"))
    closing.generate.remote("a")
    run = Run(monkeypatch, SimpleNamespace(server_handle=closing))
    with pytest.raises(AttributeError, match="no_such_thing"):
        run.manager.abort_replicas()


@pytest.mark.ray
def test_before_its_first_request_there_is_nothing_to_cancel(cluster, closing):
    cluster.get(closing.__ray_call__.remote(verl_patches.cancel, ["a"]), timeout=60)
