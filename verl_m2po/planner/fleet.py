"""The rollout servers: requests that share a server's speed, and a clock that can stand still.

All requests of a server are equally fast at any moment, so one number per server, the tokens that a request in it since
ever would have, says how far each has come: a request ends when that number has grown by its length. An event is the
next end on one server, and costs a few logarithms; a change of the weights costs one entry per server.

A heap of our own instead of simpy's processes, for which a shared speed would be an interrupt of every request whenever
one ends: a bare timeout of simpy costs 6 µs (a million of them, measured), and a whole request here about twice that.
"""

import heapq
from bisect import bisect_right, insort
from collections import deque
from dataclasses import dataclass

import numpy as np

from verl_m2po.planner.workload import Generation

_NEVER = float("inf")
_DEAD = -1  # load of a server that is down


@dataclass(slots=True)
class Generated:
    """What a group has so far.

    Args:
        left: responses that are still to come.
        tokens: weight version -> generated tokens, over all its responses.
    """

    left: int
    tokens: dict[int, int]


class Fleet:
    """Servers that decode; `now` is their own clock, in seconds, which stands still while they are interrupted.

    Args:
        generation: how many, and how fast.
        seed: of the servers' speeds.
    """

    def __init__(self, generation: Generation, seed: int) -> None:
        count = generation.servers
        spread = generation.speed_spread
        rng = np.random.default_rng([seed, 1])
        # The mean speed is that of the curve, whatever the spread.
        factors = np.exp(spread * rng.standard_normal(count) - spread**2 / 2) if spread else np.ones(count)
        self._generation = generation
        self._slots = generation.curve.max_requests
        self._speeds = generation.curve.request_tokens_per_s()
        self._factors: list[float] = factors.tolist()
        self.now = 0.0
        self.version = 0
        self._progress = [0.0] * count  # tokens of a request that was there since ever
        self._at = [0.0] * count  # when `_progress` was right, start-up and prefill included
        self._running: list[list[tuple[float, float, int]]] = [[] for _ in range(count)]  # sorted (ends, began, group)
        self._queued: list[deque[tuple[int, int]]] = [deque() for _ in range(count)]  # (length, group)
        self._load_of = [0] * count
        self._up = count
        self._marks: list[list[float]] = [[0.0] for _ in range(count)]  # `_progress` when each version came
        self._first_version = [0] * count  # of the first mark
        self._stamp = [0] * count
        self._events: list[tuple[float, int, int]] = []
        self._loads: list[tuple[int, int]] = [(0, server) for server in range(count)]
        self._changed: set[int] = set()
        self._arriving: list[tuple[float, int, int]] = []  # (when, group, length)
        self._orphans: list[tuple[int, int]] = []  # (length, group) while no server is there
        self.groups: dict[int, Generated] = {}
        self.busy_s = 0.0
        self.generated_tokens = 0
        self.prefilled_s = 0.0

    def start(self, group: int, lengths: list[int]) -> None:
        """A group is dispatched; each response goes to the server that has the fewest."""
        self.groups[group] = Generated(len(lengths), {})
        begins = self._generation.start_s
        for length in lengths:
            if not self._up:
                self._orphans.append((length, group))
            elif begins:
                heapq.heappush(self._arriving, (self.now + begins, group, length))
            else:
                self._place(group, length)

    def _place(self, group: int, length: int) -> None:
        loads, load_of = self._loads, self._load_of
        load, server = loads[0]
        while load != load_of[server]:  # an old entry; that of a dead server never fits
            heapq.heappop(loads)
            load, server = loads[0]
        load_of[server] = load + 1
        heapq.heapreplace(loads, (load + 1, server))
        running = self._running[server]
        if len(running) < self._slots:
            if self._at[server] < self.now:
                self._advance(server)
            began = self._progress[server]
            insort(running, (began + length, began, group))
            self._changed.add(server)
        else:
            self._queued[server].append((length, group))

    def _advance(self, server: int) -> None:
        """Bring a server's progress to `now`."""
        elapsed = self.now - self._at[server]
        if elapsed > 0:
            running = len(self._running[server])
            if running:
                self._progress[server] += elapsed * self._speeds[running] * self._factors[server]
                self.busy_s += elapsed
            self._at[server] = self.now

    def _schedule(self, server: int) -> None:
        """When the first request of a server ends, if nothing else changes there before."""
        self._stamp[server] += 1
        running = self._running[server]
        if running:
            seconds = (running[0][0] - self._progress[server]) / (self._speeds[len(running)] * self._factors[server])
            at = self._at[server]
            at = (at if at > self.now else self.now) + (seconds if seconds > 0 else 0.0)
            heapq.heappush(self._events, (at, self._stamp[server], server))

    def next_at(self) -> float:
        """When the next response ends, or arrives; infinite if nothing is in flight."""
        if self._changed:
            for server in self._changed:
                self._schedule(server)
            self._changed.clear()
        events, stamps = self._events, self._stamp
        while events and events[0][1] != stamps[events[0][2]]:
            heapq.heappop(events)
        ends = events[0][0] if events else _NEVER
        return min(ends, self._arriving[0][0]) if self._arriving else ends

    def run(self, until: float) -> list[int]:
        """Let things happen until a group is whole by them, or `until` comes; the groups that are whole."""
        while (at := self.next_at()) <= until and at != _NEVER:
            self.now = max(self.now, at)
            if self._arriving and self._arriving[0][0] <= self.now:
                self._arrive()
                continue
            server = heapq.heappop(self._events)[2]
            self._advance(server)
            # By definition of the event; what rounding left of the last token could keep the clock where it is.
            self._progress[server] = max(self._progress[server], self._running[server][0][0])
            if whole := self._take_ended(server):
                return whole
        self.now = max(self.now, until) if until != _NEVER else self.now
        return []

    def _arrive(self) -> None:
        _, group, length = heapq.heappop(self._arriving)
        if group not in self.groups:
            return  # aborted meanwhile
        if self._up:
            self._place(group, length)
        else:
            self._orphans.append((length, group))

    def _take_ended(self, server: int) -> list[int]:
        running, queued, whole = self._running[server], self._queued[server], []
        until = self._progress[server]
        ended = 0
        while running and running[0][0] <= until:
            ends, began, group = running.pop(0)
            ended += 1
            if self._end_response(server, ends, began, group):
                whole.append(group)
        while queued and len(running) < self._slots:
            length, group = queued.popleft()
            began = self._progress[server]
            insort(running, (began + length, began, group))
        self._relieve(server, ended)
        self._schedule(server)
        return whole

    def _relieve(self, server: int, requests: int) -> None:
        """A server has so many requests fewer."""
        self._load_of[server] -= requests
        heapq.heappush(self._loads, (self._load_of[server], server))
        if len(self._loads) > 2 * len(self._running) + 64:
            self._loads = [(load, each) for each, load in enumerate(self._load_of) if load != _DEAD]
            heapq.heapify(self._loads)

    def _end_response(self, server: int, ends: float, began: float, group: int) -> bool:
        """Book the response's tokens by weight version; whether it was the group's last."""
        generated = self.groups.get(group)
        if generated is None:
            return False  # aborted meanwhile
        self._book(server, ends, began, generated)
        self.generated_tokens += round(ends - began)
        generated.left -= 1
        return not generated.left

    def _book(self, server: int, ends: float, began: float, generated: Generated) -> None:
        marks, tokens = self._marks[server], generated.tokens
        if began >= marks[-1]:
            tokens[self.version] = tokens.get(self.version, 0) + round(ends - began)
            return
        place = bisect_right(marks, began) - 1
        done = 0
        for i in range(max(place, 0), len(marks)):
            until = ends if i + 1 == len(marks) else min(marks[i + 1], ends)
            upto = round(until - began)
            if upto > done:
                version = self._first_version[server] + i
                tokens[version] = tokens.get(version, 0) + upto - done
                done = upto

    def drop(self, groups: list[int]) -> int:
        """Abort groups, and take what is left of them from the servers; the tokens that are lost so."""
        gone = set(groups)
        lost = sum(sum(self.groups.pop(group).tokens.values()) for group in groups)
        for server, running in enumerate(self._running):
            if not any(group in gone for _, _, group in running) and not any(
                g in gone for _, g in self._queued[server]
            ):
                continue
            self._advance(server)
            progress = self._progress[server]
            lost += sum(round(progress - began) for _, began, group in running if group in gone)
            kept = [each for each in running if each[2] not in gone]
            waiting = deque(each for each in self._queued[server] if each[1] not in gone)
            left = len(running) - len(kept) + len(self._queued[server]) - len(waiting)
            self._running[server], self._queued[server] = kept, waiting
            self._relieve(server, left)
            self._take_ended(server)
        return lost

    def new_weights(self, version: int, oldest_in_flight: int) -> None:
        """Interrupted requests go on with `version`, after they were read in again.

        Args:
            version: the new weights'.
            oldest_in_flight: no request began before that version; what is older need not be remembered.
        """
        prefill, prompt = self._generation.prefill_tokens_per_s, 0
        for server, running in enumerate(self._running):
            self._advance(server)
            progress = self._progress[server]
            marks = self._marks[server]
            marks.append(progress)
            surplus = oldest_in_flight - self._first_version[server]
            if surplus > 0:
                del marks[:surplus]
                self._first_version[server] += surplus
            if running and prefill != _NEVER:
                context = len(running) * (progress + prompt) - sum(began for _, began, _ in running)
                seconds = context / prefill
                self.prefilled_s += seconds
                self._at[server] = self.now + seconds
                self._changed.add(server)
        self.version = version

    def fail(self, server: int) -> None:
        """A server dies; its requests start again from nothing on others, once these are there."""
        self._advance(server)
        lost = [(round(ends - began), group) for ends, began, group in self._running[server]]
        lost += self._queued[server]
        self._running[server], self._queued[server] = [], deque()
        self._load_of[server] = _DEAD
        self._up -= 1
        self._changed.add(server)
        self._orphans += [(length, group) for length, group in lost if group in self.groups]
        if self._up:
            self._adopt()

    def _adopt(self) -> None:
        orphans, self._orphans = self._orphans, []
        for length, group in orphans:
            if group in self.groups:
                self._place(group, length)

    def join(self, server: int) -> None:
        """A server is there again, with the present weights."""
        self._load_of[server] = 0
        self._up += 1
        self._at[server] = self.now
        heapq.heappush(self._loads, (0, server))
        self._adopt()

    def restart(self) -> None:
        """Every request starts again from nothing: the run was restarted, and what was being generated is lost."""
        for server in range(len(self._running)):
            self._advance(server)
            progress = self._progress[server]
            again = [(progress + ends - began, progress, group) for ends, began, group in self._running[server]]
            again.sort()
            self._running[server] = again
            self._changed.add(server)
