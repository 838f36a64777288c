"""The next batch is unpacked while the present one trains, so that the trainer does not wait for it."""

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

from transfer_queue import KVBatchMeta

from verl_m2po.staleness.rows.store import LotStore, batch_of, training_partition
from verl_m2po.staleness.rule.records import Group, Selection
from verl_m2po.staleness.rule.rules import StalenessRule


class _Unpacked(NamedTuple):
    group: Group
    fields: frozenset[str]


class Prefetch:
    """Unpacks in a thread what the rule expects of the next batch, and hands over what the rule then selects.

    The decision stays the rule's, at the time of the batch: what was unpacked and not selected is deleted, what was
    selected and not unpacked is unpacked then. Rows stay packed in their lots until they are handed out, so that a copy
    that is deleted loses nothing, and a checkpoint knows nothing of it.

    Args:
        rule: says what it expects, and is not changed by being asked.
        store: has the rows.
        is_on: False unpacks a batch when it is handed over.
    """

    def __init__(self, rule: StalenessRule, store: LotStore, is_on: bool = True) -> None:
        self._rule, self._store, self._is_on = rule, store, is_on
        self._version = self._count = self._taken = self._ahead = 0
        self._unpacked: dict[str, _Unpacked] = {}
        self._coming: tuple[Group, ...] = ()
        self._future: Future[frozenset[str]] | None = None

    @property
    def _partition(self) -> str:
        return training_partition(self._version)

    def expect(self, version: int, count: int) -> None:
        """The next batch is one of `count` groups, and trains from weight `version`."""
        if version != self._version:
            self.give_back()
        self._version, self._count = version, count

    def look(self) -> None:
        """Begin to unpack what is known of the next batch by now, and return at once."""
        is_over = self._rule.total_steps is not None and self._version >= self._rule.total_steps
        is_busy = self._future is not None and not self._future.done()
        if not self._is_on or not self._count or is_over or is_busy:
            return
        self.wait()
        expected = self._rule.expected(self._version, self._count)
        self._begin(tuple(group for group in expected if group.ticket.uid not in self._unpacked))

    def _begin(self, groups: tuple[Group, ...]) -> None:
        if not groups:
            return
        self._coming, self._future = groups, Future()
        # No executor: Python would wait for its thread at the end of a run whose TransferQueue is gone.
        work = (self._future, groups, self._partition)
        threading.Thread(target=self._unpack, args=work, name="prefetch", daemon=True).start()

    def _unpack(self, future: "Future[frozenset[str]]", groups: tuple[Group, ...], partition: str) -> None:
        try:
            future.set_result(self._store.unpack(groups, None, partition))
        except BaseException as error:
            future.set_exception(error)  # raised where the batch is needed

    def wait(self) -> None:
        """Until what `look` has begun is unpacked."""
        if self._future is not None:
            fields = self._future.result()
            self._unpacked |= {group.ticket.uid: _Unpacked(group, fields) for group in self._coming}
            self._coming, self._future = (), None

    def hand_over(self, selection: Selection) -> KVBatchMeta:
        """The batch that the rule has selected for `expect`, unpacked."""
        self.wait()
        groups, oldest = selection.groups, selection.oldest_version
        fields = {self._unpacked[group.ticket.uid].fields for group in groups if self._is_ready(group, oldest)}
        missing = tuple(group for group in groups if not self._is_ready(group, oldest))
        self._ahead += len(groups) - len(missing)
        if missing:
            fields.add(self._store.unpack(missing, oldest, self._partition))
        if len(fields) > 1:  # a field that some rows lack is left out of the batch
            self._store.delete_unpacked(groups, self._partition)
            self._store.unpack(groups, oldest, self._partition)
        for group in groups:
            self._unpacked.pop(group.ticket.uid, None)
        batch = batch_of(groups, self._partition)
        self._expect_what_follows(len(groups))
        return batch

    def _is_ready(self, group: Group, oldest_version: int | None) -> bool:
        """Whether it was unpacked with the masks that it is trained with. Tokens over age are not known before."""
        return group.ticket.uid in self._unpacked and (oldest_version is None or group.min_version >= oldest_version)

    def _expect_what_follows(self, count: int) -> None:
        self._taken = (self._taken + count) % self._rule.batch_size
        self.expect(self._version + (self._taken == 0), count)

    def step_metrics(self) -> dict[str, int]:
        """Of the trainer step that ends now."""
        ahead, self._ahead = self._ahead, 0
        return {"staleness/prefetched": ahead}

    def forget(self, groups: Iterable[Group]) -> None:
        """The rows of `groups` are about to be deleted."""
        uids = {group.ticket.uid for group in groups}
        if uids.intersection(group.ticket.uid for group in self._coming):
            self.wait()
        self._delete([self._unpacked[uid].group for uid in uids & self._unpacked.keys()])

    def give_back(self) -> None:
        """The batch does not come, or not now: delete what was unpacked of it."""
        self.wait()
        self._delete([each.group for each in self._unpacked.values()])

    def _delete(self, groups: Sequence[Group]) -> None:
        if groups:
            self._store.delete_unpacked(groups, self._partition)
        for group in groups:
            del self._unpacked[group.ticket.uid]
