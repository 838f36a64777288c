"""A run in which nothing moves ends, and says who waits for whom; one in which anything moves does not."""

import pytest

from verl_m2po.staleness.rule.events import Advanced, Dispatched, SetAside
from verl_m2po.staleness.rule.records import GroupReport, Ticket
from verl_m2po.staleness.watch.liveness import Watch, WorkerDied
from verl_m2po.staleness.watch.progress import Progress

KEY = "trainer.v1.stale_k.no_progress_timeout_s"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    return Progress(60.0, KEY, clock)


def tickets():
    return [Ticket(f"g{place}", place, dispatch_version=3, lot=0, prompt_index=100 + place) for place in range(12)]


def test_nothing_is_counted_before_training_begins(progress, clock):
    clock.now = 1e6
    assert progress.standstill() is None


def test_the_message_names_key_last_move_and_the_oldest_groups(progress, clock):
    progress.begin(tickets)
    clock.now = 30
    progress.on_event(Advanced(4))
    clock.now = 89
    assert progress.standstill() is None
    clock.now = 90
    said = progress.standstill()
    assert f"{KEY}=60 seconds" in said and "the last that did: weights were pushed" in said
    assert "12 prompt groups are in flight" in said and "prompt 100 (group g0, dispatched at weight version 3)" in said
    assert "g7" in said and "g8" not in said


def test_groups_without_advantage_are_progress(progress, clock):
    progress.begin(tickets)
    clock.now = 59
    progress.on_event(SetAside(tickets()[0], GroupReport("g0", (), shared_metric=1.0)))
    clock.now = 60
    assert progress.standstill() is None
    clock.now = 119
    assert "a prompt group without advantage was set aside" in progress.standstill()


def test_what_moves_nothing_does_not_count(progress, clock):
    progress.begin(tickets)
    clock.now = 59
    progress.on_event(Dispatched(tuple(tickets())))
    clock.now = 60
    assert progress.standstill()


def test_a_validation_may_take_its_time(progress, clock):
    progress.begin(tickets)
    with progress.paused():
        clock.now = 1000
        assert progress.standstill() is None
    clock.now = 1059
    assert progress.standstill() is None
    clock.now = 1060
    assert progress.standstill()


def test_null_waits_for_ever(clock):
    progress = Progress(None, KEY, clock)
    progress.begin(list)
    clock.now = 1e9
    assert progress.standstill() is None


@pytest.mark.timeout(30)
def test_the_watch_ends_what_the_trainer_waits_for():
    watch = Watch(ask_every_s=0.05, unwind_s=0.05, exit_s=None)
    progress = Progress(0.2, KEY)
    watch.end_at(progress.standstill)
    progress.begin(list)
    with pytest.raises(WorkerDied, match=r"nothing has moved for .*no group in flight"), watch.guard():
        while True:
            pass
