"""Noticing that nothing moves any more although every process answers: who waits for whom is said, and the run ends.

A group that hangs has a limit of its own (`generation_timeout_s`), and so has a push of weights. What is left is what
nobody thought of: collectives that wait for each other, a queue that lost a message, a dispatch that never arrived.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from verl_m2po.staleness.rule.events import Advanced, Event, Failed, Finished, SetAside, Trained
from verl_m2po.staleness.rule.records import Ticket

MOVES = {
    Finished: "a prompt group finished",
    Failed: "a prompt group failed",
    SetAside: "a prompt group without advantage was set aside",
    Trained: "a batch was taken to train on",
    Advanced: "weights were pushed",
}
SHOWN_GROUPS = 8
"""Groups in flight that a message names, the oldest first."""


class Progress:
    """Knows when something last moved; a listener of the buffer.

    Args:
        limit_s: wall-clock seconds without a move after which the run stands still; None: never.
        key: of the limit, for the message.
        clock: seconds; for tests.
    """

    def __init__(self, limit_s: float | None, key: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._key, self._clock = limit_s, key, clock
        self._moved_at: float | None = None
        self._last = "training began"
        self._in_flight: Callable[[], Sequence[Ticket]] = tuple

    def begin(self, in_flight: Callable[[], Sequence[Ticket]]) -> None:
        """Count from now on; `in_flight` are the groups that are being generated, in the order of dispatch."""
        self._in_flight = in_flight
        self._moved_at = self._clock()

    def on_event(self, event: Event) -> None:
        """Take note of what moves."""
        if (move := MOVES.get(type(event))) is not None and self._moved_at is not None:
            self._last, self._moved_at = move, self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing meanwhile: a validation, or a checkpoint, takes as long as it takes."""
        before, self._moved_at = self._moved_at, None
        try:
            yield
        finally:
            self._moved_at = None if before is None else self._clock()

    def standstill(self) -> str | None:
        """Who waits for whom, if nothing has moved for too long. From any thread."""
        moved_at = self._moved_at
        if self._limit_s is None or moved_at is None or self._clock() - moved_at < self._limit_s:
            return None
        tickets = self._in_flight()
        named = ", ".join(
            f"prompt {ticket.prompt_index} (group {ticket.uid}, dispatched at weight version {ticket.dispatch_version})"
            for ticket in tickets[:SHOWN_GROUPS]
        )
        waiting = (
            f"{len(tickets)} prompt groups are in flight, the oldest: {named}" if tickets else "no group in flight"
        )
        return (
            f"nothing has moved for {self._key}={self._limit_s:g} seconds; the last that did: {self._last}. {waiting}"
        )
