"""Which rollout servers may be given work, and which places are to be filled again: pure decisions, no Ray."""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


def behind(reported: Mapping[str, int | None], version: int) -> dict[str, str]:
    """The version gate: which servers may not be given work, and why.

    Args:
        reported: by server, the weight version that it says it serves; None: it does not say.
        version: that it should serve.
    """
    return {
        server: "it does not say which weights it serves" if serves is None else f"it serves weight version {serves}"
        for server, serves in reported.items()
        if serves != version
    }


@dataclass
class Vacancy:
    """The place of a server that is lost; `since` is on the fleet's clock, in seconds."""

    since: float


@dataclass
class Changes:
    """What has happened since the last question: when servers died and joined, in seconds since the epoch."""

    lost_at: list[float] = field(default_factory=list)
    joined_at: list[float] = field(default_factory=list)


class Fleet:
    """The rollout servers of a run. A server joins, serves and is lost; a place that stays vacant too long is given up.

    Every place is either served, or somebody joins there, or it is vacant, or it was given up. From any thread.

    Args:
        servers: that serve from the beginning.
        replica_timeout_s: seconds after which a place that a server has left is given up; None never gives up.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        servers: Iterable[str],
        replica_timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._serving = set(servers)
        self._joining: dict[str, Vacancy] = {}
        self._vacant: list[Vacancy] = []
        self._timeout_s, self._clock = replica_timeout_s, clock
        self._changes = Changes()
        self._lock = threading.Lock()

    @property
    def serving(self) -> frozenset[str]:
        """Servers that may be given work."""
        with self._lock:
            return frozenset(self._serving)

    @property
    def joining(self) -> frozenset[str]:
        """Servers that are up, and wait for the present weights."""
        with self._lock:
            return frozenset(self._joining)

    @property
    def vacant(self) -> int:
        """Places that wait for a new server."""
        with self._lock:
            return len(self._vacant)

    def has(self, server: str) -> bool:
        """Whether `server` takes part."""
        with self._lock:
            return server in self._serving or server in self._joining

    def lose(self, server: str) -> Vacancy | None:
        """`server` takes part no more. Its place, to be filled again; None if it is known to be lost."""
        with self._lock:
            if server in self._serving:
                vacancy = Vacancy(self._clock())
                self._serving.remove(server)
                self._changes.lost_at.append(time.time())
            elif server in self._joining:
                # It never served: its place has been empty since the one before was lost.
                vacancy = self._joining.pop(server)
            else:
                return None
            self._vacant.append(vacancy)
            return vacancy

    def arrive(self, server: str, vacancy: Vacancy) -> bool:
        """`server` is up. Whether its place still waits for it: not if the place was given up."""
        with self._lock:
            if all(vacancy is not each for each in self._vacant):
                return False
            self._vacant = [each for each in self._vacant if each is not vacancy]
            self._joining[server] = vacancy
            return True

    def admit(self, server: str) -> bool:
        """`server` has the present weights and reports them. Whether it may be given work from now on."""
        with self._lock:
            if self._joining.pop(server, None) is None:
                return False
            self._serving.add(server)
            self._changes.joined_at.append(time.time())
            return True

    def widen(self, most: int) -> Vacancy | None:
        """A further place; None if there are `most`, or one is vacant, which is filled first."""
        with self._lock:
            if self._vacant or len(self._serving) + len(self._joining) >= most:
                return None
            self._vacant.append(vacancy := Vacancy(self._clock()))
            return vacancy

    def abandon(self, vacancy: Vacancy) -> None:
        """Nobody tries to fill that place any more."""
        with self._lock:
            self._vacant = [each for each in self._vacant if each is not vacancy]

    def awaits(self, vacancy: Vacancy) -> bool:
        """Whether somebody should still try to fill that place."""
        with self._lock:
            return any(vacancy is each for each in self._vacant)

    def give_up(self) -> int:
        """Give up the places that have been vacant for too long; how many."""
        with self._lock:
            if self._timeout_s is None:
                return 0
            kept = [each for each in self._vacant if self._clock() - each.since < self._timeout_s]
            given_up = len(self._vacant) - len(kept)
            self._vacant = kept
            return given_up

    def take_changes(self) -> Changes:
        """What has happened since the last call."""
        with self._lock:
            taken, self._changes = self._changes, Changes()
            return taken
