"""The buffer on a real TransferQueue: every row arrives once, unpacked as verl wrote it, and nothing is left behind."""

import json
import queue
import random
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.trainer.ppo.v1.replay_buffer import DAPO_FILTERED_REWARD_COUNTS_KEY
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.account.ledger import TrainedRowsLedger, read_ledger
from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.buffer import StalenessReplayBuffer
from verl_m2po.staleness.restart.frames import FinishedGroup, JournalError, RowsWriter
from verl_m2po.staleness.restart.journal import Journal
from verl_m2po.staleness.rollout.masking import StoredRow, stand_in
from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.store import lot_partition
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import FailureWindow, TooManyFailures
from verl_m2po.staleness.rule.records import GroupReport, Row, Selection
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import Reuse
from verl_m2po.staleness.rule.rules import StalenessViolation
from verl_m2po.staleness.rule.units import UpdateClock
from verl_m2po.staleness.watch.liveness import WorkerDied
from verl_m2po.staleness.watch.stop import StopRequest, StopRequested

pytestmark = pytest.mark.ray

BATCH, RESPONSES = 4, 2


def response_of(uid: str, session: int) -> list[int]:
    """The tokens that a group must arrive with: of its own seed, of one to six tokens."""
    rng = random.Random(f"{uid}/{session}")
    return [rng.randrange(1000) for _ in range(rng.randrange(1, 7))]


def is_masked(uid: str, session: int, mask_share: float) -> bool:
    """Whether this trajectory failed. The first of a group never does."""
    return session > 0 and random.Random(f"failed/{uid}/{session}").random() < mask_share


def is_copy(key: str, mask_share: float) -> bool:
    """The same of a row."""
    uid, session, _ = key.rsplit("_", 2)
    return is_masked(uid, int(session), mask_share)


class Workers:
    """Agent loop workers in a thread: write rows into the group's lot and report, in random order."""

    def __init__(self, tq, fail_share: float = 0.0, seed: int = 0, mask_share: float = 0.0) -> None:
        self._tq, self._fail_share, self._random = tq, fail_share, random.Random(seed)
        self._mask_share = mask_share
        self._requests: queue.Queue = queue.Queue()
        self._reports: queue.Queue = queue.Queue()
        self.version = 0
        self.spans = None
        self.journal = None
        self.generated: list[str] = []
        self.left = 10**9
        self.has_lost_its_server = False
        self.uninformative_share = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def start(self, tickets) -> None:
        for ticket in tickets:
            self._requests.put((ticket, self.version))

    def wait(self, timeout_s: float) -> list[GroupReport]:
        reports = []
        try:
            reports.append(self._reports.get(timeout=timeout_s) if timeout_s else self._reports.get_nowait())
            while True:
                reports.append(self._reports.get_nowait())
        except queue.Empty:
            return reports

    def abort(self, uids: list[str]) -> None:
        raise AssertionError("nothing here outlives its bound")

    def _run(self) -> None:
        while True:
            waiting = [self._requests.get()]
            time.sleep(0.005)
            while not self._requests.empty():
                waiting.append(self._requests.get())
            self._random.shuffle(waiting)
            for ticket, version in waiting:
                if self.left <= 0:  # dead
                    continue
                self.left -= 1
                self._generate(ticket, version)

    def _generate(self, ticket, version: int) -> None:
        fails = self._random.random() < self._fail_share
        sessions = range(1 if fails else RESPONSES)
        masked = [session for session in sessions if is_masked(ticket.uid, session, self._mask_share)]
        stored = {session: [self._row(ticket, session, version)] for session in sessions if session not in masked}
        stored |= {session: stand_in(ticket.uid, session, stored) for session in masked}
        rows, packed = zip(*(row for session in sessions for row in stored[session]), strict=True)
        self._tq.kv_batch_put(
            keys=[row.key for row in rows],
            fields=list_of_dict_to_tensordict(list(packed)),
            partition_id=lot_partition(ticket.lot),
        )
        error = "ValueError: this one fails" if fails else None
        if self.has_lost_its_server:
            self._reports.put(GroupReport(ticket.uid, rows, "ActorDiedError: it died", was_lost=True))
            return
        shared = 1.0 if not fails and self._random.random() < self.uninformative_share else None
        if error is None and shared is None and self.journal is not None:
            self.generated.append(ticket.uid)
            RowsWriter(self.journal.rows_path(0), fsync=False).append(FinishedGroup(ticket.uid, rows, packed))
        errors = ("TimeoutError: slow",) * len(masked)
        report = GroupReport(ticket.uid, rows, error, finished_at=time.time(), masked_errors=errors)
        self._reports.put(replace(report, shared_metric=shared))

    def _fields(self, ticket, session: int) -> dict:
        responses = torch.tensor(response_of(ticket.uid, session))
        return {
            "prompts": torch.tensor([1, 2, 3]),
            "responses": responses,
            "response_mask": torch.ones_like(responses),
            "position_ids": torch.arange(3 + len(responses)),
            "rollout_log_probs": -responses.float() / 1000,
            "rm_scores": torch.zeros(len(responses)),
            "num_turns": 2,
            "extra_fields": {"session": session},
            "session_id": session,
        }

    def _row(self, ticket, session: int, version: int) -> StoredRow:
        fields = self._fields(ticket, session)
        tokens = len(fields["responses"])
        spans = self.spans(tokens, version) if self.spans else ((version, tokens),)
        return StoredRow(Row(f"{ticket.uid}_{session}_0", 3, tokens, spans), codec.pack(fields))


class Run:
    """A trainer reduced to its hooks."""

    def __init__(
        self,
        tq,
        rule,
        name: str,
        fail_share: float = 0.0,
        ledger=None,
        max_failed_fraction=1.0,
        journal=None,
        mask_share: float = 0.0,
        uninformative_share: float = 0.0,
    ) -> None:
        self.tq, self.name, self.dispatched = tq, name, 0
        self.workers = Workers(tq, fail_share, mask_share=mask_share)
        self.workers.uninformative_share = uninformative_share
        self.is_asked_to_end = False
        self.buffer = StalenessReplayBuffer(
            rule=rule,
            metrics=StalenessMetrics(UpdateClock(BATCH, BATCH // 2)),
            failures=FailureWindow(max_failed_fraction, window=10),
            listeners=[listener for listener in (ledger, journal) if listener is not None],
            dispatch=self.dispatch,
            stop=StopRequest(wait_s=0.0, look=lambda: self.is_asked_to_end),
            trainer_mode="stale_k",
            trainer_config={},
        )
        self.workers.journal = journal
        self.buffer.connect(self.workers, self.regenerate)

    def regenerate(self, tickets, prompts) -> None:
        assert as_list(prompts["uid"]) == [ticket.uid for ticket in tickets]
        self.workers.version = self.buffer.version
        self.workers.start(tickets)

    def draw(self, groups: int):
        """The next prompts of the data set, under ids of their own."""
        indices = [self.dispatched + i for i in range(groups)]
        uids = [f"{self.name}-{index}" for index in indices]
        self.dispatched += groups
        prompts = TensorDict(
            {
                "uid": NonTensorStack(*uids),
                "index": torch.tensor(indices),
                "raw_prompt": NonTensorStack(*[[{"role": "user", "content": f"prompt {index}"}] for index in indices]),
            },
            batch_size=[groups],
        )
        tu.assign_non_tensor_data(prompts, "global_steps", 1)
        return indices, prompts

    def dispatch(self, groups: int) -> None:
        indices, prompts = self.draw(groups)
        uids = as_list(prompts["uid"])
        self.workers.version = self.buffer.version
        self.workers.start(self.buffer.open_groups(uids, indices, prompts))

    def step(self, step: int, parts: int = 1, check=None) -> list:
        batches = []
        for _ in range(parts):
            batch, _ = self.buffer.sample(step, "train", BATCH // parts)
            if check:
                check(batch)
            batches.append(batch)
        self.buffer.settle()
        for batch in batches:
            self.tq.kv_clear(keys=batch.keys, partition_id="train")
        self.buffer.advance(step)
        return batches


def as_list(column) -> list:
    """Python objects come back from TransferQueue as a list or as a stack."""
    return column.tolist() if hasattr(column, "tolist") else list(column)


def assert_rows_are_those_that_were_generated(tq, batch, mask_share: float = 0.0) -> None:
    assert len(batch.keys) == len(set(batch.keys)) and len(batch.keys) % RESPONSES == 0
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train")
    assert data["responses"].is_nested and data["prompts"].is_nested
    for key, tag, responses, mask, loss_mask, log_probs, raw_prompt, uid in zip(
        batch.keys,
        batch.tags,
        data["responses"].unbind(),
        data["response_mask"].unbind(),
        data["loss_mask"].unbind(),
        data["rollout_log_probs"].unbind(),
        as_list(data["raw_prompt"]),
        as_list(data["uid"]),
        strict=True,
    ):
        group, session, _ = key.rsplit("_", 2)
        copied = is_copy(key, mask_share)
        assert responses.tolist() == response_of(group, 0 if copied else int(session))
        assert mask.tolist() == loss_mask.tolist() == [0 if copied else 1] * len(responses)
        torch.testing.assert_close(log_probs, -responses.float() / 1000)
        assert raw_prompt == [{"role": "user", "content": f"prompt {group.rsplit('-', 1)[1]}"}] and uid == group
        assert tag["seq_len"] == 3 + len(responses) and not tag.get("is_padding")


def trained_groups(batches) -> list[str]:
    return [key.rsplit("_", 2)[0] for batch in batches for key in batch.keys[::RESPONSES]]


def test_replay_trains_the_rows_that_were_generated_again_and_deletes_them_after_their_last_use(transfer_queue):
    steps, reuse = 8, Reuse(max_uses=3, first_uses=1)
    run = Run(transfer_queue, Replay(4, BATCH, reuse), "replay", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    for step in range(1, steps + 1):
        trained += run.step(step, check=lambda batch: assert_rows_are_those_that_were_generated(run.tq, batch, 0.3))
        in_store = {key.split("_")[0] for keys in run.tq.kv_list().values() for key in keys}
        assert in_store >= {group.ticket.uid for group in run.buffer.rule.stored_groups()}
    uses = Counter(trained_groups(trained))
    assert sum(uses.values()) == steps * BATCH and max(uses.values()) == 3
    left = [*run.buffer.rule.stored_groups(), *run.buffer.rule.pool.take_retired()]
    assert in_store == {group.ticket.uid for group in left}
    clear(transfer_queue)


@pytest.mark.parametrize(("k", "parts"), [(0, 1), (1, 2), (3, 1)])
def test_exact_stale_trains_every_group_once_at_its_age(transfer_queue, k, parts):
    steps, run = 8, Run(transfer_queue, ExactStale(k, BATCH), f"exact{k}", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    for step in range(1, steps + 1):
        batches = run.step(step, parts, check)
        for batch in batches:
            versions = {(tag["min_global_steps"], tag["max_global_steps"]) for tag in batch.tags}
            assert versions == {(max(0, step - 1 - k),) * 2}
        trained += trained_groups(batches)
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


@pytest.mark.parametrize("rule", [ExactStale(2, BATCH, most_in_flight=BATCH), BoundedAsync(2, BATCH)])
def test_a_group_without_advantage_is_replaced_and_is_no_failure(transfer_queue, tmp_path, rule):
    steps, path = 8, tmp_path / "rows.jsonl"
    run = Run(transfer_queue, rule, f"filtered {rule.name}", 0.1, TrainedRowsLedger(str(path)), uninformative_share=0.5)
    run.buffer.rule.limit(steps)
    trained, set_aside, failed = [], 0, 0
    for step in range(1, steps + 1):
        trained += trained_groups(run.step(step))
        metrics = run.buffer.step_metrics()
        set_aside += metrics["staleness/evicted_uninformative"]
        failed += metrics["staleness/evicted_failed"]
        assert (
            metrics["staleness/evicted"]
            == metrics["staleness/evicted_uninformative"] + metrics["staleness/evicted_failed"]
        )
        verls = metrics.get("training/filter_groups/evicted_samples", 0)
        assert verls == metrics["staleness/evicted_uninformative"]
        assert metrics[DAPO_FILTERED_REWARD_COUNTS_KEY] == ({1.0: verls} if verls else {})
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert set_aside > BATCH and run.dispatched == steps * BATCH + set_aside + failed
    lines = read_ledger(path)
    recorded = [uid for line in lines for _, uid, _, value in line.get("set_aside", []) if value == 1.0]
    assert not set(recorded) & set(trained) and 0 < len(recorded) == len(set(recorded)) <= set_aside
    if isinstance(rule, ExactStale):
        places = [group[2] for line in lines if "groups" in line for group in line["groups"]]
        assert places == list(range(steps * BATCH)), "each was replaced in its own place"
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


def test_bounded_async_trains_every_group_once_within_the_bound(transfer_queue):
    steps, run = 8, Run(transfer_queue, BoundedAsync(2, BATCH), "bounded", fail_share=0.2, mask_share=0.3)
    run.buffer.rule.limit(steps)
    trained = []
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    for step in range(1, steps + 1):
        batches = run.step(step, 2, check)
        assert all(tag["min_global_steps"] >= step - 1 - 2 for batch in batches for tag in batch.tags)
        trained += trained_groups(batches)
    assert len(trained) == len(set(trained)) == steps * BATCH
    assert not any(transfer_queue.kv_list().values()), "rows were left behind"


@pytest.mark.parametrize("mask_share", [0.0, 0.5])
def test_over_age_tokens_leave_the_masks(transfer_queue, mask_share):
    run = Run(transfer_queue, BoundedAsync(1, BATCH, min_usable_share=0.0), "masked", mask_share=mask_share)
    run.buffer.pump()
    run.buffer.wait_until(lambda: run.buffer.rule.ready == 2 * BATCH, "both batches")
    # What is ready is of version 0, all of it over age; a new generation that began with version 0 is over age in part.
    run.workers.spans = lambda tokens, version: ((0, 1), (version, tokens - 1)) if tokens > 1 else ((version, 1),)
    run.buffer.advance(1)
    run.buffer.advance(2)
    batch, _ = run.buffer.sample(3, "train", BATCH)
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id="train")
    copies = [is_copy(key, mask_share) for key in batch.keys]
    masks, loss_masks = data["response_mask"].unbind(), data["loss_mask"].unbind()
    for mask, loss_mask, copied in zip(masks, loss_masks, copies, strict=True):
        tokens = len(mask)
        expected = [0] * tokens if copied else [0] + [1] * (tokens - 1) if tokens > 1 else [1]
        assert mask.tolist() == loss_mask.tolist() == expected
    metrics = run.buffer.step_metrics()
    assert metrics["staleness/evicted_dropped"] == 2 * BATCH
    of_its_own = [mask for mask, copied in zip(masks, copies, strict=True) if not copied]
    assert metrics["staleness/over_age_tokens"] == sum(int(mask[0] == 0) for mask in of_its_own)
    assert metrics["staleness/trained_tokens"] == sum(int(mask.sum()) for mask in masks)
    assert (metrics["staleness/masked_trajectories"] > 0) == any(copies) == (mask_share > 0)
    transfer_queue.kv_clear(keys=batch.keys, partition_id="train")


def test_a_restart_continues_where_the_checkpoint_was(transfer_queue, tmp_path):
    """Saved while the batch just trained is still there and groups are in flight; both are dealt with on load."""
    whole = Run(transfer_queue, ExactStale(2, BATCH), "resumed", mask_share=0.3)
    for step in range(1, 4):
        whole.step(step)
    batch, _ = whole.buffer.sample(4, "train", BATCH)
    whole.buffer.settle()
    state = json.loads(json.dumps(whole.buffer.state_dict()))
    waiting = [group[0][0] for group in state["rule"]["ready"]]
    transfer_queue.save_checkpoint(tmp_path / "tq")

    for partition, rows in transfer_queue.kv_list().items():  # what a crash does
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)
    transfer_queue.load_checkpoint(tmp_path / "tq")
    again = Run(transfer_queue, ExactStale(2, BATCH), "after", mask_share=0.3)
    again.buffer.load_state_dict(state, version=4)
    again.buffer.begin(4)
    assert not set(batch.keys) & set(transfer_queue.kv_list("train").get("train", {})), "the trained batch came back"
    trained = []
    for step in (5, 6, 7):
        check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
        (resumed,) = again.step(step, check=check)
        assert {tag["min_global_steps"] for tag in resumed.tags} == {step - 1 - 2}
        trained.append(trained_groups([resumed]))
    assert sorted(trained[0] + trained[1]) == sorted(waiting)
    assert all(uid.startswith("after-") for uid in trained[2])
    again.buffer.settle()
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)


def clear(tq) -> None:
    for partition, rows in tq.kv_list().items():
        if rows:
            tq.kv_clear(keys=list(rows), partition_id=partition)


@pytest.mark.parametrize(("saved", "stopped", "left"), [(0, 0, 5), (2, 2, 1), (2, 4, 0), (2, 5, 3), (6, 7, 2)])
@pytest.mark.parametrize("make_rule", [lambda: ExactStale(2, BATCH), lambda: BoundedAsync(2, BATCH)])
def test_with_a_journal_a_crash_loses_only_what_was_being_generated(
    transfer_queue, tmp_path, make_rule, saved, stopped, left
):
    """Checkpoint after `saved` steps, crash after `stopped`, when `left` groups of the next weights have finished."""
    steps, settings = 9, {"some": "setting"}
    journal = Journal(tmp_path / "journal", False, settings)
    journal.start(None)
    lost = Run(
        *(transfer_queue, make_rule(), f"lost{saved}{stopped}"),
        fail_share=0.1,
        journal=journal,
        mask_share=0.3,
        uninformative_share=0.2,
    )
    lost.buffer.rule.limit(steps)
    lost.buffer.begin(0)
    state, position, drawn, trained = None, journal.position(), 0, {}
    for step in range(1, stopped + 1):
        if step == stopped and saved < stopped:
            lost.buffer.settle()
            lost.workers.left = left + 100
        trained[step] = trained_groups(lost.step(step))
        if step == saved:
            lost.buffer.settle()
            state, drawn = json.loads(json.dumps(lost.buffer.state_dict())), lost.dispatched
            journal.next_segment()
            position = journal.position()
            transfer_queue.save_checkpoint(tmp_path / "tq")
    lost.workers.left = left
    lost.buffer.pump()
    time.sleep(0.3)
    finished = set(lost.workers.generated)
    clear(transfer_queue)  # what a crash does

    journal = Journal(tmp_path / "journal", False, settings)
    again = Run(
        *(transfer_queue, make_rule(), f"again{saved}{stopped}"),
        journal=journal,
        mask_share=0.3,
        uninformative_share=0.2,
    )
    again.buffer.rule.limit(steps)
    again.dispatched = drawn
    if state is not None:
        transfer_queue.load_checkpoint(tmp_path / "tq")
        again.buffer.load_state_dict(state, version=saved)
    in_flight = [ticket.uid for ticket in again.buffer.rule.in_flight_tickets()]
    again.buffer.backlog.replay(journal.read(position["segment"], saved, in_flight, ["some"]), again.draw)
    journal.start(position["run"])
    again.buffer.begin(saved)
    tickets, prompts = again.buffer.reopen_groups()
    if tickets:
        again.regenerate(tickets, prompts)
    again.buffer.pump()
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    uids = [uid for step in range(1, saved + 1) for uid in trained[step]]
    for step in range(saved + 1, steps + 1):
        (batch,) = again.step(step, check=check)
        groups = trained_groups([batch])
        uids += groups
        ages = {step - 1 - tag["min_global_steps"] for tag in batch.tags}
        if isinstance(again.buffer.rule, ExactStale):
            assert ages == {min(step - 1, 2)}
            assert step > stopped or groups == trained[step], "the redone step trains on the same batch"
        else:
            assert min(ages) >= 0 and max(ages) <= 2
    assert len(uids) == len(set(uids)) == steps * BATCH
    prompts = [int(uid.rsplit("-", 1)[1]) for uid in uids]
    assert len(set(prompts)) == steps * BATCH, "a prompt was trained twice"
    assert not finished & set(again.workers.generated), "what was in the journal was generated again"
    clear(transfer_queue)


def test_another_data_set_than_that_of_the_journal_is_refused(transfer_queue, tmp_path):
    journal = Journal(tmp_path, False, {})
    journal.start(None)
    run = Run(transfer_queue, ExactStale(0, BATCH), "other-data", journal=journal)
    run.buffer.settle()
    again = Run(transfer_queue, ExactStale(0, BATCH), "x")
    again.dispatched = 7
    with pytest.raises(JournalError, match="dispatched prompt 0 at place 0, where the data set now gives prompt 7"):
        again.buffer.backlog.replay(journal.read(1, 0, [], []), again.draw)
    clear(transfer_queue)


def test_a_checkpoint_that_lacks_rows_is_refused(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "lost")
    run.buffer.settle()
    state = run.buffer.state_dict()
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)
    with pytest.raises(RuntimeError, match=r"lacks .* buffered rows"):
        Run(transfer_queue, ExactStale(1, BATCH), "x").buffer.load_state_dict(state, version=0)
    with pytest.raises(ValueError, match="format 0"):
        run.buffer.load_state_dict(state | {"state_version": 0}, version=0)


def test_groups_in_flight_at_the_checkpoint_start_again(transfer_queue):
    run = Run(transfer_queue, BoundedAsync(1, BATCH), "inflight")
    run.workers.start = lambda tickets: None  # they never finish
    run.buffer.pump()
    state = run.buffer.state_dict()
    again = Run(transfer_queue, BoundedAsync(1, BATCH), "other")
    again.buffer.load_state_dict(state, version=3)
    again.buffer.begin(3)
    tickets, prompts = again.buffer.reopen_groups()
    assert [ticket.uid for ticket in tickets] == as_list(prompts["uid"]) == [f"inflight-{i}" for i in range(8)]
    assert {ticket.dispatch_version for ticket in tickets} == {3}
    assert prompts["index"].tolist() == list(range(8))
    again.workers.version = 3
    again.workers.start(tickets)
    (batch,) = again.step(4)
    assert {tag["min_global_steps"] for tag in batch.tags} == {3}
    for partition, rows in transfer_queue.kv_list().items():
        if rows:
            transfer_queue.kv_clear(keys=list(rows), partition_id=partition)


def test_the_wrong_version_stops_the_run_with_a_report(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "wrong")
    run.workers.spans = lambda tokens, version: ((version + 1, tokens),)
    with pytest.raises(StalenessViolation, match=r"must come from weight version 0, but row wrong-\d+_0_0"):
        run.buffer.settle()


def test_too_many_failures_stop_the_run(transfer_queue):
    run = Run(transfer_queue, ExactStale(0, BATCH), "failing", fail_share=1.0, max_failed_fraction=0.2)
    with pytest.raises(TooManyFailures, match="10 x ValueError: this one fails"):
        run.buffer.sample(1, "train", BATCH)


def test_what_is_lost_with_a_process_ends_the_run_and_not_its_prompts(transfer_queue, tmp_path):
    """Were these groups replaced as failed ones are, a restart would skip their prompts."""
    journal = Journal(tmp_path, False, {})
    journal.start(None)
    run = Run(transfer_queue, ExactStale(0, BATCH), "lost", journal=journal)
    run.workers.has_lost_its_server = True
    with pytest.raises(WorkerDied, match=r"group lost-\d+ cannot be generated.*ActorDiedError"):
        run.buffer.sample(1, "train", BATCH)
    assert run.dispatched == run.buffer.rule.in_flight == BATCH
    assert [kind for kind, _ in journal.read(1, 0, [], []).events] == ["dispatched"]
    clear(transfer_queue)


def test_too_many_masked_trajectories_stop_the_run_as_well(transfer_queue):
    run = Run(transfer_queue, BoundedAsync(3, BATCH), "half", mask_share=1.0, max_failed_fraction=0.4)
    with pytest.raises(TooManyFailures, match=r"^5 of the last 10 prompt groups failed.*\n  10 x TimeoutError: slow$"):
        run.buffer.wait_until(lambda: False, "it stops by itself")
    assert run.buffer.step_metrics()["staleness/masked_trajectories"] == 10
    assert run.buffer.rule.ready == 10, "what is masked is kept"
    clear(transfer_queue)


def test_a_run_that_is_asked_to_end_waits_for_no_generation(transfer_queue):
    run = Run(transfer_queue, ExactStale(0, BATCH), "endless")
    run.workers.start = lambda tickets: None  # they never finish
    run.is_asked_to_end = True
    with pytest.raises(StopRequested, match="a batch of 4 groups is not there yet"):
        run.buffer.sample(1, "train", BATCH)
    with pytest.raises(StopRequested, match="the present weights still have to generate"):
        run.buffer.settle()
    assert run.buffer.rule.in_flight == BATCH, "what is in flight is saved, to be generated again"


def test_the_ledger_has_every_row_before_it_is_trained(transfer_queue, tmp_path):
    run = Run(transfer_queue, ExactStale(1, BATCH), "ledger", ledger=TrainedRowsLedger(str(tmp_path / "rows.jsonl")))
    (batch,) = run.step(1)
    (line,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (line["step"], line["version"], line["oldest_version"]) == (1, 0, None)
    assert [row[0] for group in line["groups"] for row in group[3]] == batch.keys
    run.buffer.settle()


def test_validation_goes_verls_way_and_sees_only_its_own_rows(transfer_queue):
    run = Run(transfer_queue, ExactStale(1, BATCH), "val")
    run.buffer.settle()
    uids = ["va", "vb"]
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 0} for _ in uids]
    transfer_queue.kv_batch_put(keys=uids, partition_id="val", tags=tags)
    for uid in uids:
        fields = list_of_dict_to_tensordict([{"responses": torch.arange(3)}])
        tag = {"status": "success", "seq_len": 3}
        transfer_queue.kv_batch_put(keys=[f"{uid}_0_0"], partition_id="val", fields=fields, tags=[tag])
        transfer_queue.kv_put(key=uid, partition_id="val", tag={"status": "finished"})
    batch, _ = run.buffer.sample(0, "val", 2)
    assert sorted(batch.keys) == ["va_0_0", "vb_0_0"] and batch.partition_id == "val"
    assert set(run.buffer.partitions) == {"val"}
    transfer_queue.kv_clear(keys=batch.keys, partition_id="val")


class EveryBatchTwice(BoundedAsync):
    """Hands out each batch at two steps in a row."""

    kept = ()

    def select(self, version, count):
        if self.kept:
            groups, self.kept = self.kept, ()
            return Selection(groups, None)
        selection = super().select(version, count)
        if selection is None or not selection.groups:
            return selection
        self.kept = selection.groups
        return replace(selection, kept=frozenset(group.ticket.uid for group in selection.groups))


def test_what_the_rule_keeps_is_trained_again_and_then_leaves(transfer_queue):
    run = Run(transfer_queue, EveryBatchTwice(3, BATCH), "twice", mask_share=0.3)
    check = lambda batch: assert_rows_are_those_that_were_generated(transfer_queue, batch, 0.3)  # noqa: E731
    (first,), (second,), (third,) = (run.step(step, check=check) for step in (1, 2, 3))
    assert first.keys == second.keys and not set(first.keys) & set(third.keys)
    left = {key for rows in transfer_queue.kv_list().values() for key in rows}
    assert not set(first.keys) & left, "rows that were used up are still there"
    assert set(third.keys) <= left, "rows that are kept are gone"
    clear(transfer_queue)
