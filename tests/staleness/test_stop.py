"""Being asked to end: what the trainer notices and when, what the driver does with the first signal and the second."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from verl_m2po.launch import signals
from verl_m2po.launch.signals import Listener
from verl_m2po.staleness.watch import stop as stopping
from verl_m2po.staleness.watch.stop import StopRequest, StopRequested
from verl_m2po.staleness.watch.stopping import Stopping


@pytest.fixture
def clock(monkeypatch):
    """Seconds, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


class Asked:
    """Whether the run was asked to end, and how often anybody looked."""

    def __init__(self) -> None:
        self.answer, self.looks = False, 0

    def __call__(self) -> bool:
        self.looks += 1
        return self.answer


def test_a_run_that_nobody_asks_waits_for_ever_and_hardly_looks(clock):
    asked = Asked()
    stop = StopRequest(10.0, asked)
    for _ in range(1000):
        clock[0] += 0.01
        stop.give_up_waiting_for("x")
    assert asked.looks <= 11, "ten seconds, one look each"
    assert not stop.is_made()


def test_a_request_is_seen_at_once_at_the_end_of_a_step(clock):
    asked = Asked()
    stop = StopRequest(10.0, asked)
    assert not stop.is_made()
    asked.answer = True
    assert stop.is_made()


def test_a_wait_is_given_up_after_its_time(clock):
    asked = Asked()
    asked.answer = True
    stop = StopRequest(10.0, asked)
    stop.give_up_waiting_for("a batch is not there yet")
    clock[0] += 9.9
    stop.give_up_waiting_for("a batch is not there yet")
    clock[0] += 0.1
    with pytest.raises(StopRequested, match="after another 10 s a batch is not there yet"):
        stop.give_up_waiting_for("a batch is not there yet")


def test_null_waits_as_long_as_it_takes(clock):
    stop = StopRequest(None, lambda: True)
    for _ in range(3):
        clock[0] += 1e6
        stop.give_up_waiting_for("x")
    assert stop.is_made()


def driver(body: str) -> subprocess.CompletedProcess:
    """A process that listens, without a cluster: `state` stands for Ray's key-value store."""
    start = """
        import os, signal, time
        from verl_m2po.launch import signals
        from verl_m2po.staleness.watch import stop
        state = set()
        stop.is_set, stop.put = state.__contains__, state.add
        signals.ray.is_initialized, signals.ray.shutdown = lambda: True, lambda: None
        listener = signals.Listener()
        listener.start()
        def send(number, seconds=5.0):
            os.kill(os.getpid(), number)
            until = time.monotonic() + seconds
            while "stop" not in state and time.monotonic() < until:
                time.sleep(0.01)
    """
    code = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)


@pytest.mark.slow
@pytest.mark.parametrize("number", signals.SIGNALS)
def test_the_first_signal_asks_and_the_status_tells(number):
    ended = driver(f"state.add('training'); send({int(number)}); print('still here'); listener.stop()")
    assert ended.returncode == 128 + number, ended.stderr
    assert "still here" in ended.stdout and "saving a checkpoint" in ended.stderr


@pytest.mark.slow
def test_an_error_on_the_way_out_is_not_hidden_by_the_status():
    ended = driver("state.add('training'); send(15); listener.stop(tell_status=False); raise OSError('disk full')")
    assert ended.returncode == 1 and "disk full" in ended.stderr


@pytest.mark.slow
def test_the_second_signal_leaves_at_once():
    ended = driver("state.add('training'); send(2); send(15); print('still here')")
    assert ended.returncode == 128 + signal.SIGTERM
    assert "leaving at once" in ended.stderr and "still here" not in ended.stdout


@pytest.mark.slow
def test_before_training_there_is_nothing_to_wait_for():
    ended = driver("send(2); print('still here')")
    assert ended.returncode == 128 + signal.SIGINT
    assert "still here" not in ended.stdout


def test_without_a_signal_nothing_ends_and_the_handlers_are_back():
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    listener = Listener()
    listener.start()
    assert signal.getsignal(signal.SIGTERM) == listener._handle
    listener.stop()
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm")
@pytest.mark.parametrize("end", ["listener.stop()", "state.add('training'); send(2, 0.1); send(2, 0.1)"])
def test_neither_processes_nor_their_shared_memory_stay(end):
    """A child that dies as Ray's workers do, without a chance to unlink; a file of somebody else's beside it."""
    body = f"""
        import subprocess, sys
        from pathlib import Path
        child = (
            "import mmap, multiprocessing as mp, sys, time; "
            "from multiprocessing import shared_memory as sm; "
            "segment = sm.SharedMemory(create=True, size=64); "
            "lock = mp.get_context('spawn').Lock(); "
            "other = open('/dev/shm/m2po_test_model', 'wb+'); other.write(b'x' * 64); other.flush(); "
            "m = mmap.mmap(other.fileno(), 64); "
            "print(segment.name, flush=True); time.sleep(600)"
        )
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
        name = process.stdout.readline().strip()
        print(process.pid, name, len(signals._segments([process.pid])), flush=True)
        original = signals._Left.remove
        signals._Left.remove = lambda left, grace_s: original(left, grace_s=0.0)
        {end}
    """
    ended = driver(body)
    pid, name, segments = ended.stdout.split()[:3]
    try:
        assert int(segments) == 2, "the block of shared memory and the lock"
        assert not Path("/proc", pid, "cmdline").exists() or not Path("/proc", pid, "cmdline").read_bytes()
        assert not Path("/dev/shm", name).exists()
        assert Path("/dev/shm/m2po_test_model").exists()
    finally:
        Path("/dev/shm/m2po_test_model").unlink(missing_ok=True)


class Saves:
    """A trainer that remembers what it wrote."""

    def __init__(self, saved: int = 0) -> None:
        self.saved, self.step, self.looks_until_asked = saved, 0, 10**9
        self.stopping = Stopping(StopRequest(0.0, self.is_asked), lambda: self.saved)

    def is_asked(self) -> bool:
        self.looks_until_asked -= 1
        return self.looks_until_asked < 0

    def end(self) -> bool:
        return self.stopping.ends_after(self.step, self.save)

    def save(self) -> None:
        self.saved = self.step

    def validate(self, verls) -> dict:
        return self.stopping.validate(self.step, verls, self.end)


@pytest.mark.parametrize(("begun", "saved", "words"), [(4, 4, []), (4, 2, ["step 4 is lost", "that of step 2"])])
def test_a_step_is_lost_only_if_it_was_not_saved(caplog, begun, saved, words):
    """Asked to end after the updates of step 4, in the wait before its weights are pushed."""
    trainer = Saves(saved)
    trainer.stopping.begin(begun)
    assert trainer.stopping.step_to_save(4, StopRequested("the run was asked to end")) is None
    assert ("lost" in caplog.text) == bool(words) and all(word in caplog.text for word in words)


@pytest.mark.parametrize(("saved", "to_save"), [(2, 3), (3, None)])
def test_a_step_without_a_batch_saves_the_one_before(saved, to_save):
    trainer = Saves(saved)
    trainer.stopping.begin(3)
    assert trainer.stopping.step_to_save(4, StopRequested("the run was asked to end")) == to_save


def test_a_run_that_is_asked_to_end_saves_before_it_validates():
    trainer = Saves(saved=2)
    trainer.step, trainer.looks_until_asked = 7, 0
    trainer.stopping.begin(7)
    assert trainer.validate(lambda: pytest.fail("it validates")) == {} and trainer.saved == 7


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_run_that_is_asked_to_end_while_it_validates_saves_then(caplog, gives_up):
    trainer = Saves(saved=2)
    trainer.step, trainer.looks_until_asked = 7, 1
    trainer.stopping.begin(7)

    def verls() -> dict:
        if gives_up:
            trainer.stopping.request.is_made()
            trainer.stopping.request.give_up_waiting_for("the responses are not there yet")
        return {"acc": 0.5}

    assert trainer.validate(verls) == ({} if gives_up else {"acc": 0.5})
    assert trainer.saved == 7 and ("validation after trainer step 7 is given up" in caplog.text) == gives_up


def test_a_validation_that_nobody_interrupts_is_verls():
    trainer = Saves(saved=2)
    trainer.step = 7
    assert trainer.validate(lambda: {"acc": 0.5}) == {"acc": 0.5}, "before training nothing is looked at"
    trainer.stopping.begin(7)
    assert trainer.validate(lambda: {"acc": 0.5}) == {"acc": 0.5} and trainer.saved == 2
