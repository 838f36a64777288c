"""Unpacking the next batch ahead changes nothing of what is trained, loses nothing and leaves nothing behind."""

import json
import threading
from collections.abc import Callable

import pytest
from buffer_runs import BATCH, PromptWorkers, Run, assert_rows_are_those_that_were_generated, clear
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Trace, Workload

from verl_m2po.staleness.account.ledger import TrainedRowsLedger, read_ledger
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.bounded_replay import BoundedReplay
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.records import Selection
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import SAMPLING, Reuse
from verl_m2po.staleness.rule.rules import StalenessRule

STEPS = 9

RULES: dict[str, tuple[Callable[[], StalenessRule], int]] = {
    "on-policy": (lambda: ExactStale(0, BATCH), 1),
    "exact": (lambda: ExactStale(2, BATCH), 1),
    "exact in mini-batches": (lambda: ExactStale(1, BATCH), 2),
    "bounded": (lambda: BoundedAsync(2, BATCH), 2),
    "replay": (lambda: Replay(4, BATCH, Reuse(None, 1)), 1),
    "newest": (lambda: Replay(4, BATCH, Reuse(3, 2, "newest")), 1),
    "self-imitation": (lambda: Replay(4, BATCH, Reuse(None, 2, "positive")), 1),
    "bounded replay": (lambda: BoundedReplay(3, BATCH, Reuse(None, 1)), 2),
}


class Unpacking:
    """What a run unpacks, and where."""

    def __init__(self, run: Run) -> None:
        self.by_thread: dict[bool, list[str]] = {True: [], False: []}
        self._unpack, self._lock = run.buffer._store.unpack, threading.Lock()
        run.buffer._store.unpack = self

    def __call__(self, groups, *args):
        with self._lock:
            is_ahead = threading.current_thread() is not threading.main_thread()
            self.by_thread[is_ahead] += [group.ticket.uid for group in groups]
        return self._unpack(groups, *args)


def ledger(tq, tmp_path, rule: str, prefetch: bool, saves: bool) -> tuple[list, Unpacking]:
    """What a run of `STEPS` steps trains, in which every third step ends in a checkpoint if `saves`."""
    make, parts = RULES[rule]
    path = tmp_path / f"{prefetch}-{saves}.jsonl"
    run = Run(
        *(tq, make(), "ahead", 0.2, TrainedRowsLedger(str(path))),
        mask_share=0.3,
        prefetch=prefetch,
        workers=PromptWorkers,
    )
    seen = Unpacking(run)
    run.buffer.rule.limit(STEPS)
    for step in range(1, STEPS + 1):
        run.step(step, parts, lambda batch: assert_rows_are_those_that_were_generated(tq, batch, 0.3))
        if saves and step % 3 == 0:
            json.dumps(run.buffer.state_dict())
            lots = [name for name, rows in tq.kv_list().items() if rows]
            assert all(name.startswith("staleness_lot") for name in lots), "a copy would be in the checkpoint"
    run.buffer.prefetch.give_back()
    left = {key.split("_")[0] for keys in tq.kv_list().values() for key in keys}
    retired = run.buffer.rule.pool.take_retired() if hasattr(run.buffer.rule, "pool") else ()
    assert left == {group.ticket.uid for group in (*run.buffer.rule.stored_groups(), *retired)}
    clear(tq)
    return [(line["step"], line["version"], line["oldest_version"], line["groups"]) for line in read_ledger(path)], seen


@pytest.mark.ray
@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_with_and_without_prefetch_the_same_rows_are_trained(transfer_queue, tmp_path, rule, saves):
    plain, nothing_ahead = ledger(transfer_queue, tmp_path, rule, prefetch=False, saves=saves)
    ahead, seen = ledger(transfer_queue, tmp_path, rule, prefetch=True, saves=saves)
    assert ahead == plain
    assert [line[0] for line in plain] == sorted([*range(1, STEPS + 1)] * RULES[rule][1])
    assert nothing_ahead.by_thread[True] == [] and seen.by_thread[True]


@pytest.mark.ray
def test_a_batch_that_is_known_is_unpacked_before_it_is_asked_for(transfer_queue, tmp_path):
    """Batches 0 to 2 are generated before the first step."""
    run = Run(transfer_queue, ExactStale(2, BATCH), "known", workers=PromptWorkers)
    run.buffer.rule.limit(STEPS)
    run.buffer.settle()
    run.step(1)
    assert run.buffer.step_metrics()["staleness/prefetched"] == 0
    seen = Unpacking(run)
    for step in range(2, STEPS + 1):
        run.step(step)
        assert run.buffer.step_metrics()["staleness/prefetched"] == BATCH
    assert seen.by_thread[False] == [] and len(seen.by_thread[True]) == (STEPS - 2) * BATCH
    clear(transfer_queue)


class Forgetful(ExactStale):
    """Expects the batch after the next, which is not the one that it selects."""

    def expected(self, version, count):
        return list(self._batches.get(self._next_batch + 1, {}).values())


@pytest.mark.ray
def test_what_was_expected_and_is_not_selected_is_given_back(transfer_queue):
    run = Run(transfer_queue, Forgetful(2, BATCH), "wrong", workers=PromptWorkers)
    run.buffer.rule.limit(4)
    run.buffer.settle()
    for step in range(1, 5):
        (batch,) = run.step(step, check=lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch))
        assert len(batch.keys) == 2 * BATCH
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


class Uneven(PromptWorkers):
    """Every other group has a field that the rest lack."""

    def _fields(self, ticket, session: int) -> dict:
        fields = super()._fields(ticket, session)
        return fields | ({"turn": session} if ticket.place % 2 else {})


@pytest.mark.ray
def test_a_field_that_some_rows_lack_is_left_out_whatever_was_unpacked_ahead(transfer_queue):
    run = Run(transfer_queue, ExactStale(0, BATCH), "uneven", workers=Uneven)
    run.buffer.settle()
    prefetch, waiting = run.buffer.prefetch, run.buffer.rule.stored_groups()
    prefetch.expect(0, BATCH)
    prefetch._begin(tuple(group for group in waiting if group.ticket.place % 2))
    batch, _ = run.buffer.sample(1, "train", BATCH)
    assert_rows_are_those_that_were_generated(transfer_queue, batch)
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    assert "session_id" in data.keys() and "turn" not in data.keys()  # noqa: SIM118 (a TensorDict)
    clear(transfer_queue)


@pytest.mark.ray
def test_what_went_wrong_in_the_thread_is_raised_where_the_batch_is_needed(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "broken", workers=PromptWorkers)
    run.buffer.settle()
    run.buffer.sample(1, "train", BATCH)
    unpack, run.buffer._store.unpack = run.buffer._store.unpack, lambda *_: 1 / 0
    run.buffer.prefetch.look()
    with pytest.raises(ZeroDivisionError):
        run.buffer.prefetch.hand_over(Selection((), None))
    run.buffer._store.unpack = unpack
    clear(transfer_queue)


class Glancing(Simulation):
    """Asks at every turn what is expected, and compares with what is selected."""

    def _try_select(self) -> bool:
        count = self.rule.batch_size // self.parts
        before = json.dumps(self.rule.state_dict()) if not self._is_amid_batch() else None
        expected = {group.ticket.uid for group in self.rule.expected(self.version, count)}
        assert before is None or before == json.dumps(self.rule.state_dict()), "it changed the rule"
        trained = len(self.trace.trained)
        if not super()._try_select():
            return False
        chosen = self.trace.trained[trained:]
        oldest = self.rule.oldest_usable(self.version)
        uids = {group.ticket.uid for *_, group in chosen if group.min_version >= oldest}
        assert uids <= expected
        assert len(uids) < len(chosen) or uids == expected, "more was expected than selected"
        return True

    def _is_amid_batch(self) -> bool:
        return isinstance(self.rule, ExactStale) and self.rule._next_row > 0

    def _run_for(self, time: float) -> None:
        self.rule.expected(self.version + 1, self.rule.batch_size // self.parts)
        super()._run_for(time)


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["exact", "bounded", "replay", "bounded replay"]),
    steps=st.integers(0, 5),
    parts=st.sampled_from([1, 2]),
    sampling=st.sampled_from(SAMPLING),
    max_uses=st.none() | st.integers(2, 6),
    speed=st.sampled_from([40.0, 400.0, 4000.0]),
    seed=st.integers(0, 2**32),
)
def test_what_is_expected_right_before_a_batch_is_selected_and_to_ask_changes_nothing(
    kind, steps, parts, sampling, max_uses, speed, seed
):
    reuse = Reuse(max_uses, 2, sampling, seed)
    make: dict[str, Callable[[], StalenessRule]] = {
        "exact": lambda: ExactStale(steps, 8),
        "bounded": lambda: BoundedAsync(steps, 8),
        "replay": lambda: Replay(steps, 8, reuse),
        "bounded replay": lambda: BoundedReplay(steps, 8, reuse),
    }
    is_whole = kind == "replay"
    work = Workload(lambda rng: rng.uniform(5, 50), speed, fail_share=0.1, rows=1, overlaps=not is_whole)

    def trace(simulation: type[Simulation]) -> Trace:
        return simulation(make[kind](), work, seed, 1 if is_whole else parts).run(25)

    assert trace(Glancing) == trace(Simulation)
