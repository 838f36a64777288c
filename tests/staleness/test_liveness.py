"""A process of the run dies: whatever the trainer waits for, it ends in an error that says who."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from verl_m2po.staleness.restart.journal import Journal
from verl_m2po.staleness.rollout.manager import StalenessAgentLoopManager
from verl_m2po.staleness.rollout.reports import WorkerReports, answer_timeout_s
from verl_m2po.staleness.rule.records import GroupReport
from verl_m2po.staleness.watch.liveness import RunActors, Watch, WorkerDied

pytestmark = pytest.mark.ray


@pytest.fixture
def actor(cluster):
    """An actor that can be killed, and one that is busy for ever."""

    @cluster.remote(num_cpus=0)
    class Actor:
        def pid(self) -> int:
            return os.getpid()

        def work(self) -> None:
            time.sleep(3600)

    return Actor.remote


def watch(**actors) -> Watch:
    watch = Watch(ask_every_s=0.2, unwind_s=0.5, exit_s=None)
    for name, handle in actors.items():
        watch.add(name, [handle])
    return watch


def kill(cluster, actor) -> None:
    os.kill(cluster.get(actor.pid.remote()), signal.SIGKILL)


def test_a_hanging_trainer_is_interrupted_and_the_dead_are_named(cluster, actor):
    dead, busy = actor(), actor()
    busy.work.remote()
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="rollout died"), watch(rollout=dead, busy=busy).guard():
        kill(cluster, dead)
        time.sleep(60)
    assert time.monotonic() - began < 30


def test_so_is_one_that_waits_in_ray(cluster, actor):
    dead, busy = actor(), actor()
    with pytest.raises(WorkerDied, match="rollout died"), watch(rollout=dead).guard():
        kill(cluster, dead)
        cluster.get(busy.work.remote())


def test_who_answered_before_the_error_is_asked_again(cluster, actor):
    """A question of the watching thread that was answered late, and that nobody has looked at since."""
    dead = actor()
    watch = Watch(ask_every_s=60, unwind_s=0.5, exit_s=None)
    watch.add("rollout", [dead])
    answered = dead.__ray_ready__.remote()
    watch._questions[answered] = dead
    cluster.get(answered, timeout=60)
    with pytest.raises(WorkerDied, match="rollout died"), watch.guard():
        kill(cluster, dead)
        raise ValueError("too many failures")


def test_an_error_that_a_death_has_caused_names_the_dead(cluster, actor):
    """Too many failed groups, for example, after a rollout server is gone."""
    dead = actor()
    with pytest.raises(WorkerDied, match="rollout died") as died, watch(rollout=dead).guard():
        kill(cluster, dead)
        with contextlib.suppress(ActorUnavailableError, ActorDiedError):
            cluster.get(dead.pid.remote(), timeout=60)  # an error that the death has caused comes after it
        raise ValueError("too many failures")
    assert isinstance(died.value.__cause__, ValueError)


def test_other_errors_stay_what_they_are(actor):
    with pytest.raises(ValueError, match="of its own"), watch(rollout=actor()).guard():
        raise ValueError("of its own")


def test_the_living_and_the_busy_disturb_nobody(cluster, actor):
    idle, busy = actor(), actor()
    busy.work.remote()
    with watch(idle=idle, busy=busy).guard():
        cluster.get(idle.pid.remote())
        time.sleep(1.5)  # several rounds of questions


@pytest.fixture
def raising(cluster):
    """An actor that raises errors of a given name, or what another one raises."""

    @cluster.remote(num_cpus=0)
    class Raising:
        def fail(self, error: str) -> None:
            raise type(error, (Exception,), {})("what it says")

        def ask(self, other) -> None:
            import ray

            ray.get(other.fail.remote("ValueError"))

    return Raising.remote


def error_of(cluster, call) -> Exception:
    with pytest.raises((RayTaskError, ActorDiedError)) as failed:
        cluster.get(call)
    return failed.value


def test_the_death_of_an_engine_is_told_from_other_errors_of_its_server(cluster, raising):
    server = raising()
    run_actors = RunActors([server])
    assert run_actors.is_death(error_of(cluster, server.fail.remote("EngineDeadError")))
    assert not run_actors.is_death(error_of(cluster, server.fail.remote("ValueError")))


def test_the_death_of_an_actor_of_the_run_is_told_from_that_of_a_users_own(cluster, raising):
    server, tool, asking = raising(), raising(), raising()
    run_actors = RunActors([server, asking])
    cluster.kill(server)
    cluster.kill(tool)
    assert run_actors.is_death(error_of(cluster, server.fail.remote("ValueError")))
    assert not run_actors.is_death(error_of(cluster, tool.fail.remote("ValueError")))
    assert run_actors.is_death(error_of(cluster, asking.ask.remote(server))), "told by another that lives"
    assert not run_actors.is_death(error_of(cluster, asking.ask.remote(tool)))
    assert run_actors.is_death(ActorDiedError()), "whose death it is, nobody says"


def test_an_actor_that_is_unavailable_turns_out_dead_or_not(cluster, actor, monkeypatch):
    monkeypatch.setattr("verl_m2po.staleness.watch.liveness.MACHINE_DEATH_S", 1.0)
    dead, living, busy, tool = (actor() for _ in range(4))
    run_actors = RunActors([dead, living, busy])
    busy.work.remote()
    for killed in (dead, tool):
        cluster.kill(killed)

    def settled(of) -> tuple[BaseException, BaseException]:
        error = ActorUnavailableError("no answer", of._actor_id.binary())
        return error, asyncio.run(run_actors.settle(error))

    assert isinstance(settled(dead)[1], ActorDiedError)
    for of in (living, busy, tool):
        before, after = settled(of)
        assert before is after and not run_actors.is_death(after)


@pytest.mark.parametrize(("lasts", "is_death"), [(3, True), (1000, False)])
def test_an_actor_on_a_machine_that_is_gone_is_dead_when_ray_has_learnt_of_it(monkeypatch, lasts, is_death):
    """Ray learns of the death of a process at once, and of that of a machine after a quarter of a minute."""
    monkeypatch.setattr("verl_m2po.staleness.watch.liveness.ASK_AGAIN_S", 0.001)
    monkeypatch.setattr("verl_m2po.staleness.watch.liveness.MACHINE_DEATH_S", 0.2)
    actor_id, answers = b"a" * 16, iter([ActorUnavailableError("no answer", None)] * lasts + [None, ActorDiedError()])

    async def ask():
        if (answer := next(answers)) is None:
            await asyncio.sleep(0.05)  # a question that Ray keeps, until it knows
            raise next(answers)
        raise answer

    ready = SimpleNamespace(remote=ask)
    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=actor_id.hex), __ray_ready__=ready)
    error = ActorUnavailableError("no answer", actor_id)
    assert isinstance(asyncio.run(RunActors([actor]).settle(error)), ActorDiedError) == is_death


@pytest.mark.parametrize(
    ("error", "looks", "is_found"),
    [
        (ConnectionError("broken"), 2, True),
        (ConnectionError("broken"), 1000, False),
        (ActorUnavailableError("no answer", None), 20, True),
        (ActorUnavailableError("no answer", None), 1000, False),
    ],
)
def test_of_what_is_unavailable_the_death_is_waited_for_longer(monkeypatch, error, looks, is_found):
    monkeypatch.setattr("verl_m2po.staleness.watch.liveness.FIND_CAUSE_S", 0.05)
    monkeypatch.setattr("verl_m2po.staleness.watch.liveness.MACHINE_DEATH_S", 1.0)
    watch, looked = Watch(), []

    def look(_timeout_s):
        looked.append(time.sleep(0.01))
        return None, False

    monkeypatch.setattr(watch, "_look", look)
    assert watch.find_cause_until(lambda: len(looked) >= looks, error) == is_found


def test_a_death_that_nobody_takes_care_of_is_the_end_of_the_search(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(watch, "_look", lambda _: ("the actor worker died.", True))
    assert not watch.find_cause_until(lambda: False, ActorUnavailableError("no answer", None))


@pytest.fixture
def server():
    """A rollout server of which only `/health` is there, and the status that it answers."""
    status = [HTTPStatus.OK]

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status[0] if self.path == "/health" else HTTPStatus.NOT_FOUND)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", status
        server.shutdown()


def test_an_engine_that_died_behind_its_server_is_named(server):
    address, status = server
    watched = watch()
    watched.add_engines("rollout engine", [address])
    assert watched.find_dead(timeout_s=0.1) is None
    status[0] = HTTPStatus.NOT_FOUND
    assert watched.find_dead(timeout_s=0.1) is None, "a server without that page says nothing"
    status[0] = HTTPStatus.SERVICE_UNAVAILABLE
    assert watched.find_dead(timeout_s=0.1) == f"rollout engine at {address} died."


def test_a_server_that_does_not_answer_is_its_actors_business():
    watched = watch()
    watched.add_engines("rollout engine", ["127.0.0.1:9"])
    assert watched.find_dead(timeout_s=0.1) is None


@pytest.fixture
def babbler():
    """The address of a server that speaks something else than HTTP, and ends the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(1024)
                        connection.sendall(b"\x00\x00\x18\x04\x00")

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_port_that_is_another_ones_by_now_says_nothing(babbler):
    watched = watch()
    watched.add_engines("rollout engine", [babbler])
    assert watched.find_dead(timeout_s=0.1) is None


def test_an_engine_is_watched_until_it_is_dropped(server):
    address, status = server
    watched = watch()
    watched.add_engines("rollout engine", [address])
    status[0] = HTTPStatus.SERVICE_UNAVAILABLE
    watched.drop_engine(address)
    assert watched.find_dead(timeout_s=0.1) is None


def test_a_look_that_fails_does_not_end_the_watch(monkeypatch, caplog):
    looks = iter([RuntimeError("what nobody thought of"), "rollout server 0 died."])

    def find_dead(timeout_s: float) -> str:
        if isinstance(look := next(looks), Exception):
            raise look
        return look

    watched = Watch(ask_every_s=0.01, unwind_s=0.01, exit_s=None)
    monkeypatch.setattr(watched, "find_dead", find_dead)
    with pytest.raises(WorkerDied, match="rollout server 0 died"), watched.guard():
        time.sleep(30)
    assert "what nobody thought of" in caplog.text


def test_one_of_several_is_told_apart(cluster, actor):
    several = [actor(), actor()]
    watch = Watch()
    watch.add("agent loop worker", several)
    kill(cluster, several[1])
    assert watch.find_dead(timeout_s=10.0).startswith("agent loop worker 1 of 2 died")


@pytest.fixture
def worker(cluster):
    """An agent loop worker that answers, or does not."""

    @cluster.remote(num_cpus=0)
    class Worker:
        def pid(self) -> int:
            return os.getpid()

        async def take_reports(self) -> list:
            await asyncio.sleep(0.1)
            return ["a report"]

        async def accept(self, *_) -> None:
            pass

        depend_on = journal_to = generate_sequences = accept

        async def block(self) -> None:
            time.sleep(3600)

    return Worker.remote


def test_reports_come_from_whoever_has_some(worker):
    reports = WorkerReports([worker(), worker()], answer_timeout_s=60)
    assert reports.wait(timeout_s=30.0)


def test_a_blocked_agent_loop_worker_is_an_error_after_its_time(cluster, worker):
    fine, blocked = worker(), worker()
    cluster.get([fine.pid.remote(), blocked.pid.remote()])
    blocked.block.remote()
    reports = WorkerReports([fine, blocked], answer_timeout_s=1.0)
    with pytest.raises(RuntimeError, match="worker 1 of 2 has not answered for 1 s"):
        for _ in range(100):
            reports.wait(timeout_s=0.2)


class Prompts(list):
    """What a manager does with a TensorDict."""

    def chunk(self, parts: int) -> list:
        return self[:parts]


@pytest.mark.parametrize("question", ["generate_sequences", "depend_on", "journal_to"])
def test_whatever_a_blocked_worker_is_asked_the_trainer_does_not_wait_for_ever(cluster, worker, tmp_path, question):
    fine, blocked = worker(), worker()
    manager = object.__new__(StalenessAgentLoopManager)
    manager.agent_loop_workers, manager._next_worker, manager.answer_timeout_s = [fine, blocked], 0, 1.0
    manager.heals = False
    reports, journal = WorkerReports([fine, blocked], answer_timeout_s=1.0), Journal(tmp_path, False, {})
    journal.start(None)
    ask = {
        "generate_sequences": lambda: manager.generate_sequences(Prompts("ab")),
        "depend_on": lambda: reports.depend_on([]),
        "journal_to": lambda: reports.journal_to(journal),
    }[question]
    for index in range(2):
        journal.rows_path(index).touch()
    cluster.get([each.__ray_ready__.remote() for each in (fine, blocked)])
    ask()
    blocked.block.remote()
    with pytest.raises(RuntimeError, match=r"1 of 2 agent loop workers have not answered for 1 s.*asyncio.to_thread"):
        ask()


@pytest.mark.parametrize(("generation_s", "answer_s"), [(None, None), (3600.0, 7260.0)])
def test_no_limit_on_a_generation_is_none_on_an_answer(generation_s, answer_s):
    assert answer_timeout_s(generation_s) == answer_s


def test_a_dead_agent_loop_worker_is_an_error(cluster, worker):
    dead = worker()
    reports = WorkerReports([dead])
    kill(cluster, dead)
    with pytest.raises(RuntimeError, match="agent loop worker 0 of 1 died"):
        for _ in range(100):
            reports.wait(timeout_s=0.2)


class Pool:
    """Replaces workers by new ones of the same class."""

    def __init__(self, worker, groups: list[str], can_replace: bool = True) -> None:
        self._worker, self._groups, self.can_replace = worker, groups, can_replace
        self.ended_groups: list[str] = []
        self.new = None

    def ended(self, _worker, uids: list[str]) -> None:
        self.ended_groups += uids

    def replace(self, _index: int):
        self.new = self._worker()
        return self.new, self._groups


def lost_reports(reports: WorkerReports) -> list:
    for _ in range(100):
        if lost := [report for report in reports.wait(timeout_s=0.2) if report.was_lost]:
            return lost
    raise AssertionError("nobody has noticed the death")


def test_the_groups_of_a_dead_agent_loop_worker_are_lost_and_another_one_takes_its_place(cluster, noting, tmp_path):
    dead, fine = noting(), noting()
    pool, journal = Pool(noting, ["a", "b"]), Journal(tmp_path, False, {})
    journal.start(None)
    reports = WorkerReports([dead, fine], answer_timeout_s=60, pool=pool)
    reports.depend_on([fine])
    reports.journal_to(journal)
    kill(cluster, dead)
    lost = lost_reports(reports)
    assert [(report.uid, report.deaths) for report in lost] == [("a", 1), ("b", 1)]
    told = cluster.get(pool.new.told.remote())
    assert told["depend_on"] == ([fine],), "it knows what the others know"
    assert told["journal_to"] == (str(journal.rows_path(2)), False), "a file that a death has cut off is left alone"
    assert reports.wait(timeout_s=30.0), "the others, and the new one, report as ever"


def test_one_that_dies_before_it_is_noticed_does_not_hinder_what_the_others_are_told(cluster, noting, tmp_path):
    dead, fine = noting(), noting()
    journal = Journal(tmp_path, False, {})
    journal.start(None)
    reports = WorkerReports([dead, fine], answer_timeout_s=60, pool=Pool(noting, []))
    kill(cluster, dead)
    reports.journal_to(journal)
    assert cluster.get(fine.told.remote())["journal_to"] == (str(journal.rows_path(1)), False)


def test_where_nobody_may_be_replaced_a_dead_agent_loop_worker_is_an_error(cluster, noting):
    dead = noting()
    reports = WorkerReports([dead], pool=Pool(noting, [], can_replace=False))
    kill(cluster, dead)
    with pytest.raises(RuntimeError, match="agent loop worker 0 of 1 died"):
        lost_reports(reports)


@pytest.fixture
def noting(cluster):
    """An agent loop worker that remembers what it was told last, and writes its journal's file."""

    @cluster.remote(num_cpus=0)
    class Worker:
        def __init__(self) -> None:
            self._told = {}

        def pid(self) -> int:
            return os.getpid()

        async def take_reports(self) -> list:
            await asyncio.sleep(0.1)
            return [GroupReport("c", ())]

        async def depend_on(self, actors) -> None:
            self._told["depend_on"] = (actors,)

        async def journal_to(self, path, fsync) -> None:
            self._told["journal_to"] = (path, fsync)
            with open(path, "wb"):
                pass

        async def told(self) -> dict:
            return self._told

    return Worker.remote


def test_a_death_that_somebody_takes_care_of_ends_nothing_and_is_told_once(cluster, actor):
    dead, other, told = actor(), actor(), []

    def heal(key, reason: str) -> bool:
        told.append((key, reason))
        return key == dead

    of = watch(healed=dead, other=other)
    of.heal_with(heal)
    with of.guard():
        kill(cluster, dead)
        time.sleep(1.5)  # several rounds of questions
    ((key, reason),) = told
    assert key == dead and reason.startswith("healed died.")
    with pytest.raises(WorkerDied, match="other died"), of.guard():
        kill(cluster, other)
        time.sleep(60)
