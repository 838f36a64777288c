"""Bounded staleness: no token older than the bound is trained on, and hardly any started generation is wasted."""

import heapq
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from verl_m2po.staleness.rule.records import Group, Selection, Ticket
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateCount


class BoundedAsync(StalenessRule):
    """No token older than the bound is trained on; what is started is paced so that hardly anything is wasted.

    The age of a token is counted from the version that generated it, time in the queue included. In this order:

    1. *Pace.* At weight version v at most (v + bound + 1) batches have been admitted since the run began; a group that
       replaces a failed one is not counted. As the oldest groups are trained first, a group that finishes at once is
       trained at an age of at most the bound, however deep the queue is. Only a generation that itself takes longer
       than the bound can go over it.
    2. *Abort.* A group in flight for `a` weight versions has about (bound + 1) / (a + 1) of its tokens within the
       bound; when that falls below `min_usable_share` the rest of the generation is not worth its cost.
    3. *Mask.* A finished group with at least `min_usable_share` of its tokens within the bound is trained; the older
       tokens are masked. Long answers are kept that way, where dropping would teach the model to be short.
    4. *Drop.* Any other finished group is dropped.

    `bound_steps` may move during a run, up to `staleness_steps`; a new bound holds from the next call on.

    Args:
        staleness_steps: the bound in trainer steps, and the largest that it may be moved to.
        batch_size: prompt groups per trainer step.
        min_usable_share: 0 never aborts and drops a group only if none of its tokens is within the bound; 1 never
            masks: a group with one token over the bound is dropped.
        updates: counts the optimizer updates that each trainer step really made. Where steps make more updates than
            configured, fewer of them are within the bound. None: every step makes the same number.
    """

    name = "bounded_async"

    def __init__(
        self,
        staleness_steps: int,
        batch_size: int,
        min_usable_share: float = 0.25,
        updates: UpdateCount | None = None,
    ) -> None:
        super().__init__(staleness_steps, batch_size)
        if not 0 <= min_usable_share <= 1:
            raise ValueError(f"min_usable_share is {min_usable_share}; it is a share of tokens, from 0 to 1")
        self.bound_steps = staleness_steps
        self.min_usable_share = min_usable_share
        self._updates = updates
        self._trained = 0
        self._ready: list[tuple[int, int, Group]] = []

    @property
    def ready(self) -> int:
        return len(self._ready)

    def stored_groups(self) -> list[Group]:
        return self._waiting()

    def _waiting(self) -> list[Group]:
        return [group for _, _, group in sorted(self._ready, key=lambda item: item[:2])]

    def oldest_usable(self, version: int) -> int:
        oldest = version - self.bound_steps
        if self._updates is None:
            return oldest
        return self._updates.oldest_within(self._updates.clock.updates(self.bound_steps), version, oldest)

    @property
    def trained(self) -> int:
        """Groups that were handed out for training since the run began."""
        return self._trained

    def admissible(self, version: int) -> int:
        return max(0, self._horizon(version) * self.batch_size - self._trained - self.depth)

    def _take_place(self, version: int) -> int:
        place = self._next_place
        self._next_place += 1
        return place

    def _check_finished(self, group: Group) -> None:
        return

    def _store(self, group: Group) -> None:
        heapq.heappush(self._ready, (group.min_version, group.ticket.place, group))

    def _release(self, ticket: Ticket) -> None:
        return

    def expired(self, version: int) -> list[str]:
        uids, bound_steps = [], version - self.oldest_usable(version)
        for ticket in self._in_flight.values():
            if ticket.uid in self._postponed:
                continue
            share = (bound_steps + 1) / (version - ticket.dispatch_version + 1)
            if share >= self.min_usable_share:
                break  # in order of dispatch: the younger ones have a larger share
            uids.append(ticket.uid)
        return uids

    def _is_usable(self, group: Group, oldest_version: int) -> bool:
        share = group.usable_share(oldest_version)
        return share > 0 and share >= self.min_usable_share

    def select(self, version: int, count: int) -> Selection | None:
        chosen, evicted = self._take(count, count, version)
        if len(chosen) < count:
            return Selection((), None, tuple(evicted)) if evicted else None
        self._trained += count
        return Selection(tuple(chosen), self._masks_before(chosen, version), tuple(evicted))

    def expected(self, version: int, count: int) -> Sequence[Group]:
        # Groups with a token over age are masked, or dropped, when it is known how old they are.
        oldest = self.oldest_usable(version)
        return list(islice((group for *_, group in _in_order(self._ready) if group.min_version >= oldest), count))

    def _take(self, least: int, most: int, version: int) -> tuple[list[Group], list[Group]]:
        """Up to `most` of the oldest usable groups, none if there are not `least`; and those that no longer are.

        Whatever is given up is given up together, so that what replaces it starts together.
        """
        if len(self._ready) < least:
            return [], []
        chosen, evicted = self._take_over_age(self.oldest_usable(version), most)
        if len(chosen) + len(self._ready) < least:
            for group in chosen:
                self._store(group)
            return [], evicted
        more = min(most - len(chosen), len(self._ready))
        return chosen + [heapq.heappop(self._ready)[2] for _ in range(more)], evicted

    def _take_over_age(self, oldest_version: int, most: int) -> tuple[list[Group], list[Group]]:
        """Up to `most` usable groups with a token before `oldest_version`; and those on the way that are not usable."""
        usable: list[Group] = []
        evicted: list[Group] = []
        while self._ready and self._ready[0][0] < oldest_version and len(usable) < most:
            group = heapq.heappop(self._ready)[2]
            (usable if self._is_usable(group, oldest_version) else evicted).append(group)
        return usable, evicted

    def _masks_before(self, groups: list[Group], version: int) -> int | None:
        """The oldest version that may be trained, if some token is older; else None."""
        oldest_version = self.oldest_usable(version)
        return oldest_version if any(group.min_version < oldest_version for group in groups) else None

    def settled(self, version: int) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        ready = [group.to_json() for group in self._waiting()]
        return super().state_dict() | {"trained": self._trained, "ready": ready}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._trained = state["trained"]
        self._ready = []
        for data in state["ready"]:
            self._store(Group.from_json(data))

    def reissue(self, uid: str, version: int) -> Ticket:
        # Dispatch order is version order: `expired` reads the oldest first.
        ticket = super().reissue(uid, version)
        self._in_flight[uid] = self._in_flight.pop(uid)
        return ticket


def _in_order(heap: list[tuple[int, int, Group]]) -> Iterator[tuple[int, int, Group]]:
    """The items of a heap, the smallest first, which stay in it; the first k cost O(k log k)."""
    near = [(heap[0], 0)] if heap else []
    while near:
        item, place = heapq.heappop(near)
        yield item
        for child in range(2 * place + 1, min(2 * place + 3, len(heap))):
            heapq.heappush(near, (heap[child], child))
