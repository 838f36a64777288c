"""The rollout servers: requests that share a server's speed, and a clock that can stand still.

Whatever changes the fleet (new requests, new weights, a server that dies or joins) brings all servers to that moment,
and makes a new calendar from there: one pass over all requests. Nothing happens in between but groups that are whole.
"""

from collections import deque

import numpy as np
from numpy import ndarray

from verl_m2po.planner.calendar import Calendar
from verl_m2po.planner.requests import NOWHERE, Requests, Servers
from verl_m2po.planner.workload import Generation

_NEVER = float("inf")

Whole = tuple[int, dict[int, int]]
"""Number of a prompt group whose responses have all ended, and its tokens by weight version."""


class Fleet:
    """Servers that decode; `now` is their own clock, in seconds, which stands still while they are interrupted.

    Args:
        generation: how many, and how fast.
        seed: of the servers' speeds.
        gathers: a few new requests wait for others until they are this share of those in flight, at most until the next
            push; only where nobody waits for a single one. 0: each is placed at once.
    """

    def __init__(self, generation: Generation, seed: int, gathers: float = 0.0) -> None:
        count, spread = generation.servers, generation.speed_spread
        rng = np.random.default_rng([seed, 1])
        # The mean speed is that of the curve, whatever the spread.
        factors = np.exp(spread * rng.standard_normal(count) - spread**2 / 2) if spread else np.ones(count)
        self._generation, self._gathers = generation, gathers
        self._servers = Servers.of(factors, generation.curve.request_tokens_per_s())
        self._requests = Requests.of([], [])
        self._calendar: Calendar | None = None
        self._marks: deque[ndarray] = deque([np.zeros(count)])  # progress of the servers when each version came
        self._first_version = 0  # of the first mark
        self._arriving: deque[tuple[float, int, list[int]]] = deque()  # (when, group, lengths)
        self._arriving_requests = self._in_flight = 0  # the latter when the calendar was made
        self.now = 0.0
        self.busy_s = 0.0
        self.generated_tokens = 0
        self.prefilled_s = 0.0

    def start(self, group: int, lengths: list[int]) -> None:
        """A group is dispatched, numbered above all before it; each response goes to the server with the fewest."""
        self._arriving.append((self.now + self._generation.start_s, group, lengths))
        self._arriving_requests += len(lengths)

    def next_at(self) -> float:
        """When the next group is whole, or arrives; infinite if nothing is in flight."""
        whole_at = self._planned().next_at
        if not self._arriving:
            return whole_at
        are_enough = self._arriving_requests >= self._gathers * self._in_flight
        return min(self._arriving[0][0], whole_at) if are_enough or whole_at == _NEVER else whole_at

    def run(self, until: float) -> list[Whole]:
        """Let things happen until a group is whole by them, or `until` comes; the groups that are whole."""
        while (at := self.next_at()) <= until and at != _NEVER:
            self.now = max(self.now, at)
            calendar = self._planned()
            if calendar.next_at > at:
                self._arrive()
                continue
            marks = list(self._marks)
            whole = [calendar.take(marks, self._first_version)]
            while calendar.next_at <= at:
                whole.append(calendar.take(marks, self._first_version))
            return whole
        self.now = max(self.now, until) if until != _NEVER else self.now
        return []

    @property
    def all_begun_at(self) -> float:
        """When no request is in a server's queue any more, if nothing else happens before; -inf: none is."""
        self._arrive()
        return self._planned().all_begun_at

    def _planned(self) -> Calendar:
        if self._calendar is None:
            self._calendar = Calendar(self._requests, self._servers, self.now)
            self._in_flight = int(self._requests.is_live.sum())
        return self._calendar

    def _settle(self) -> Requests:
        """Bring everything to `now`; what the caller changes then counts from here on."""
        self._requests, busy_s, tokens = self._planned().bring_to(self.now)
        self._calendar = None
        self.busy_s += busy_s
        self.generated_tokens += tokens
        return self._requests

    def _arrive(self) -> None:
        arrived = []
        while self._arriving and self._arriving[0][0] <= self.now:
            arrived.append(self._arriving.popleft())
        if not arrived:
            return
        self._arriving_requests -= sum(len(lengths) for _, _, lengths in arrived)
        before = self._settle()
        new = Requests.of([group for _, group, _ in arrived], [lengths for _, _, lengths in arrived])
        self._requests = before.followed_by(new)
        self._place(np.arange(len(before), len(self._requests)))

    def _place(self, index: ndarray) -> None:
        """Give requests without a server one each, as far as any is up."""
        servers, requests = self._servers, self._requests
        if not len(index) or not servers.is_up.any():
            return
        has_one = requests.is_live & (requests.server != NOWHERE)
        loads = np.bincount(requests.server[has_one], minlength=len(servers))
        server, before = servers.least_loaded(loads, len(index))
        requests.server[index] = server
        requests.began[index] = np.where(before < servers.slots, servers.progress[server], np.nan)

    def _homeless(self) -> ndarray:
        return np.flatnonzero(self._requests.is_live & (self._requests.server == NOWHERE))

    def drop(self, groups: list[int]) -> int:
        """Abort groups, and take what is left of them from the servers; the tokens that are lost so."""
        gone = set(groups)
        self._arriving = deque(each for each in self._arriving if each[1] not in gone)
        self._arriving_requests = sum(len(lengths) for _, _, lengths in self._arriving)
        requests = self._settle()
        is_gone = np.isin(requests.group, groups)
        lost = _generated(requests.select(is_gone), self._servers.progress)
        self._requests = requests.select(~is_gone)
        self._fill_slots()
        return lost

    def _fill_slots(self) -> None:
        """Begin what waits in the queue of a server with free slots."""
        requests, servers = self._requests, self._servers
        waits = np.flatnonzero(requests.is_live & np.isnan(requests.began) & (requests.server != NOWHERE))
        if not len(waits):
            return
        runs = requests.is_live & ~np.isnan(requests.began)
        free = servers.slots - np.bincount(requests.server[runs], minlength=len(servers))
        waits = waits[np.argsort(requests.server[waits], kind="stable")]
        server = requests.server[waits]
        place = np.arange(len(waits)) - np.searchsorted(server, server)
        begins = waits[place < free[server]]
        requests.began[begins] = servers.progress[requests.server[begins]]

    def new_weights(self, version: int, oldest_in_flight: int) -> None:
        """Interrupted requests go on with `version`, after they were read in again.

        Args:
            version: the new weights', one above the last.
            oldest_in_flight: no request began before that version; what is older need not be remembered.
        """
        self._arrive()
        requests, servers = self._settle(), self._servers
        self._marks.append(servers.progress.copy())
        for _ in range(max(0, min(oldest_in_flight, version) - self._first_version)):
            self._marks.popleft()
            self._first_version += 1
        if self._generation.prefill_tokens_per_s != _NEVER:
            self._read_in_again(requests, servers)

    def _read_in_again(self, requests: Requests, servers: Servers) -> None:
        runs = requests.is_live & ~np.isnan(requests.began)
        server = requests.server[runs]
        context = servers.progress[server] - requests.began[runs]
        seconds = np.bincount(server, context, minlength=len(servers)) / self._generation.prefill_tokens_per_s
        has_any = np.bincount(server, minlength=len(servers)) > 0
        servers.at[has_any] = self.now + seconds[has_any]
        self.prefilled_s += float(seconds.sum())

    def fail(self, server: int) -> None:
        """A server dies; its requests start again from nothing on others, once these are there."""
        requests = self._settle()
        lost = requests.indices_on(server)
        requests.server[lost], requests.began[lost] = NOWHERE, np.nan
        self._servers.is_up[server] = False
        self._place(self._homeless())

    def join(self, server: int) -> None:
        """A server is there again, with the present weights."""
        self._settle()
        self._servers.is_up[server] = True
        self._servers.at[server] = self.now
        self._place(self._homeless())

    def restart(self) -> None:
        """Every request starts again from nothing: the run was restarted, and what was being generated is lost."""
        requests = self._settle()
        runs = requests.is_live & ~np.isnan(requests.began)
        requests.began[runs] = self._servers.progress[requests.server[runs]]


def _generated(requests: Requests, progress: ndarray) -> int:
    """Tokens that requests have by now."""
    done = np.where(requests.is_live, 0.0, requests.length)
    runs = requests.is_live & ~np.isnan(requests.began)
    done[runs] = np.rint(progress[requests.server[runs]] - requests.began[runs])
    return int(done.sum())
