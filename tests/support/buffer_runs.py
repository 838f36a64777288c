"""A trainer reduced to its hooks, and agent loop workers in a thread, on a real TransferQueue."""

import queue
import random
import threading
import time
from collections import Counter
from dataclasses import replace

import torch
from rollout_simulation import outcome
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.utils import tensordict_utils as tu
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.buffer import StalenessReplayBuffer
from verl_m2po.staleness.restart.frames import FinishedGroup, RowsWriter
from verl_m2po.staleness.rollout.masking import StoredRow, stand_in
from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.store import lot_partition
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import GroupReport, Row
from verl_m2po.staleness.rule.units import UpdateClock
from verl_m2po.staleness.watch.stop import StopRequest

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
        self.lose_share = 0.0
        self.lost: Counter = Counter()
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
        if not fails and self.lost[ticket.uid] < 2 and self._random.random() < self.lose_share:
            self.lost[ticket.uid] += 1
            self._reports.put(GroupReport(ticket.uid, (), "ServerDied: it died", was_lost=True, deaths=1, moves=1))
            return
        shared = None if fails else self._shared_metric([row for session in sessions for row in stored[session]])
        if error is None and shared is None and self.journal is not None:
            self.generated.append(ticket.uid)
            RowsWriter(self.journal.rows_path(0), fsync=False).append(FinishedGroup(ticket.uid, rows, packed))
        errors = ("TimeoutError: slow",) * len(masked)
        report = GroupReport(ticket.uid, rows, error, finished_at=time.time(), masked_errors=errors)
        self._reports.put(replace(report, shared_metric=shared))

    def _shared_metric(self, rows: list[StoredRow]) -> float | None:
        """Why a group has no advantage, if it has none."""
        return 1.0 if self._random.random() < self.uninformative_share else None

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


class PromptWorkers(Workers):
    """The same without a thread: its seed says at which turn a report comes, whatever the machine does."""

    def start(self, tickets) -> None:
        for ticket in self._random.sample(tickets, len(tickets)):
            self._generate(ticket, self.version)

    def wait(self, timeout_s: float) -> list[GroupReport]:
        count = self._random.randint(1 if timeout_s else 0, 3)
        return [self._reports.get_nowait() for _ in range(min(count, self._reports.qsize()))]

    def _run(self) -> None:
        return


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
        prefetch: bool = True,
        workers=Workers,
        poisoned=None,
    ) -> None:
        self.tq, self.name, self.dispatched = tq, name, 0
        self.workers = workers(tq, fail_share, mask_share=mask_share)
        self.workers.uninformative_share = uninformative_share
        self.is_asked_to_end = False
        self.buffer = StalenessReplayBuffer(
            rule=rule,
            metrics=StalenessMetrics(UpdateClock(BATCH, BATCH // 2)),
            failures=FailureWindow(max_failed_fraction, window=10),
            listeners=[listener for listener in (poisoned, ledger, journal) if listener is not None],
            dispatch=self.dispatch,
            poisoned=poisoned,
            stop=StopRequest(wait_s=0.0, look=lambda: self.is_asked_to_end),
            trainer_mode="stale_k",
            trainer_config={},
            prefetch=prefetch,
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
        tickets, _ = self.buffer.without_poisoned(self.buffer.open_groups(uids, indices, prompts), prompts)
        self.workers.start(tickets)

    def step(self, step: int, parts: int = 1, check=None) -> list:
        batches = []
        for _ in range(parts):
            batch, _ = self.buffer.sample(step, "train", BATCH // parts)
            if self.buffer.rule.needs_outcomes:
                self.buffer.rule.judge({uid: outcome(uid) for uid in trained_groups([batch])})
            self.buffer.prefetch.look()  # while the actor is updated
            if check:
                check(batch)
            batches.append(batch)
        self.buffer.settle()
        for batch in batches:
            self.tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        self.buffer.advance(step)
        return batches


def as_list(column) -> list:
    """Python objects come back from TransferQueue as a list or as a stack."""
    return column.tolist() if hasattr(column, "tolist") else list(column)


def assert_rows_are_those_that_were_generated(tq, batch, mask_share: float = 0.0) -> None:
    assert len(batch.keys) == len(set(batch.keys)) and len(batch.keys) % RESPONSES == 0
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
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


def clear(tq) -> None:
    for partition, rows in tq.kv_list().items():
        if rows:
            tq.kv_clear(keys=list(rows), partition_id=partition)
