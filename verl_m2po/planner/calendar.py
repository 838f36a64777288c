"""When each request ends, and each prompt group is whole, if nothing else happens before.

All requests of a server are equally fast at any moment, so one number for each server, the tokens that a request there
since ever would have, says how far each has come: a request ends when that number has grown by its length. Between two
changes of the fleet the ends on all servers are sums, made at once. An event is then a group that is whole.
"""

import heapq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy import ndarray

from verl_m2po.planner.requests import NOWHERE, Requests, Servers

CHUNK_GROUPS = 1024
"""Groups whose tokens are counted at once; a change throws away what was counted and not taken."""


@dataclass(frozen=True)
class _Ends:
    """The ends on all servers, by server and then in their order.

    Args:
        index: of the request.
        server: of the request.
        began: progress of its server when it begins, or began.
        progress: of its server when it ends.
        at: seconds.
        first: for each server the position of its first end, and of the end of its last.
    """

    index: ndarray
    server: ndarray
    began: ndarray
    progress: ndarray
    at: ndarray
    first: ndarray


class Calendar:
    """What happens from `now` on.

    Args:
        requests: of all groups that are not whole.
        servers: as they are at `now`, or at a moment before since which nothing has changed.
        now: seconds.
    """

    def __init__(self, requests: Requests, servers: Servers, now: float) -> None:
        self._requests, self._servers = requests, servers
        self._ends = _ends(requests, servers, now)
        ends_at = np.where(requests.is_live, np.inf, -np.inf)
        ends_at[self._ends.index] = self._ends.at
        self._starts = requests.starts
        self._sizes = np.diff(self._starts, append=len(requests))
        whole_at = np.maximum.reduceat(ends_at, self._starts) if len(requests) else np.zeros(0)
        self._order = np.argsort(whole_at, kind="stable")
        self._whole_at: list[float] = [*whole_at[self._order].tolist(), np.inf]
        self._taken = 0
        self._counted: list[tuple[int, dict[int, int]]] = []

    @property
    def next_at(self) -> float:
        """When the next group is whole; inf: none will be."""
        return self._whole_at[self._taken]

    @property
    def all_begun_at(self) -> float:
        """When the last of those in a server's queue begins; -inf: none is in a queue."""
        ends, at = self._ends, -np.inf
        queued = np.isnan(self._requests.began[ends.index])
        for server in np.unique(ends.server[queued]):
            here = slice(ends.first[server], ends.first[server + 1])
            last = ends.began[here][queued[here]].max()
            # It begins when another one ends.
            at = max(at, float(ends.at[here][np.searchsorted(ends.progress[here], last)]))
        return at

    def take(self, marks: list[ndarray], first_version: int) -> tuple[int, dict[int, int]]:
        """The next group that is whole, and its tokens by weight version.

        Args:
            marks: progress of all servers when each version came, the present one last.
            first_version: of the first mark; what was generated before it counts as of that version.
        """
        if not self._counted:
            self._counted = self._count(self._order[self._taken : self._taken + CHUNK_GROUPS], marks, first_version)
            self._counted.reverse()
        self._taken += 1
        return self._counted.pop()

    def _count(self, groups: ndarray, marks: list[ndarray], first_version: int) -> list[tuple[int, dict[int, int]]]:
        requests, sizes = self._requests, self._sizes[groups]
        offsets = np.cumsum(sizes) - sizes
        index = np.repeat(self._starts[groups] - offsets, sizes) + np.arange(sizes.sum())
        length, server = requests.length[index], requests.server[index]
        # What had not begun at this calendar's start began with the present version.
        began = requests.began[index]
        upto = [np.zeros(len(index))]
        for mark in marks[1:]:
            tokens = np.clip(np.rint(mark[server] - began), 0, length)
            upto.append(np.where(np.isnan(began), 0.0, tokens))
        upto.append(length)
        by_version = [np.add.reduceat(b - a, offsets).astype(np.int64).tolist() for a, b in pairwise(upto)]
        numbers = requests.group[self._starts[groups]].tolist()
        return [
            (number, {first_version + i: tokens for i, tokens in enumerate(column) if tokens})
            for number, column in zip(numbers, zip(*by_version, strict=True), strict=True)
        ]

    def bring_to(self, now: float) -> tuple[Requests, float, int]:
        """Bring the servers to `now`, in place, and say what is left.

        Returns:
            The requests of the groups that were not taken, the seconds in which servers were busy, and the tokens of
            the requests that ended.
        """
        ends, servers, requests = self._ends, self._servers, self._requests
        has_ended = ends.at <= now
        count = np.bincount(ends.server[has_ended], minlength=len(servers))
        left = np.diff(ends.first) - count
        some = np.flatnonzero(count)
        last = ends.first[some] + count[some] - 1
        since = servers.at.copy()
        servers.progress[some], since[some] = ends.progress[last], ends.at[last]
        until = np.where(left > 0, now, since)
        busy_s = float(np.maximum(until - servers.at, 0.0).sum())
        speed = servers.speeds[np.minimum(left, servers.slots)] * servers.factor
        servers.progress += np.maximum(now - since, 0.0) * speed
        servers.at[:] = np.maximum(servers.at, now)

        # A queued request begins when one before it ends.
        begun = has_ended | (ends.began <= servers.progress[ends.server])
        requests.began[ends.index[begun]] = ends.began[begun]
        ended = ends.index[has_ended]
        requests.is_live[ended] = False
        is_left = np.ones(len(self._starts), dtype=bool)
        is_left[self._order[: self._taken]] = False
        left_requests = requests if is_left.all() else requests.select(np.repeat(is_left, self._sizes))
        return left_requests, busy_s, int(requests.length[ended].sum())


def _ends(requests: Requests, servers: Servers, now: float) -> _Ends:
    index = np.flatnonzero(requests.is_live & (requests.server != NOWHERE))
    server, began = requests.server[index], requests.began[index]
    if np.isnan(began).any():
        began = _with_queued(server, began, requests.length[index])
    progress = began + requests.length[index]
    order = np.lexsort((progress, server))
    index, server, began, progress = index[order], server[order], began[order], progress[order]
    counts = np.bincount(server, minlength=len(servers))
    first = np.concatenate(([0], np.cumsum(counts)))
    before = np.concatenate(([0.0], progress[:-1]))
    is_first = np.zeros(len(index), dtype=bool)
    is_first[first[:-1][counts > 0]] = True
    before[is_first] = servers.progress[server[is_first]]
    running = np.minimum(counts[server] - (np.arange(len(index)) - first[server]), servers.slots)
    seconds = np.maximum(progress - before, 0.0) / (servers.speeds[running] * servers.factor[server])
    elapsed = np.cumsum(seconds)
    at = np.maximum(servers.at, now)[server] + elapsed - np.concatenate(([0.0], elapsed))[first[server]]
    return _Ends(index, server, began, progress, at, first)


def _with_queued(server: ndarray, began: ndarray, length: ndarray) -> ndarray:
    """`began` of those in a queue too: when one that is before them on their server ends."""
    began = began.copy()
    queued = np.flatnonzero(np.isnan(began))
    has_queue = np.isin(server, np.unique(server[queued]))
    running = np.flatnonzero(has_queue & ~np.isnan(began))
    heaps: dict[int, list[float]] = {}
    for each, ends in zip(server[running].tolist(), (began + length)[running].tolist(), strict=True):
        heaps.setdefault(each, []).append(ends)
    for heap in heaps.values():
        heapq.heapify(heap)
    starts = []
    for each, tokens in zip(server[queued].tolist(), length[queued].tolist(), strict=True):
        heap = heaps[each]
        starts.append(heap[0])
        heapq.heapreplace(heap, heap[0] + tokens)
    began[queued] = starts
    return began
