"""The requests of prompt groups that are not whole yet, as flat arrays in the order in which the groups began."""

from dataclasses import dataclass, fields

import numpy as np
from numpy import ndarray

NOWHERE = -1
"""Server of a request that waits for one."""


@dataclass
class Requests:
    """One entry for each response; the entries of a group follow each other.

    Args:
        group: int64, number of the prompt group.
        length: float64, tokens.
        server: int32; `NOWHERE` while none is there.
        began: float64, the server's progress when it began; nan in a queue.
        is_live: bool; the response has not ended.
    """

    group: ndarray
    length: ndarray
    server: ndarray
    began: ndarray
    is_live: ndarray

    @classmethod
    def of(cls, groups: list[int], lengths: list[list[int]]) -> "Requests":
        """Requests that have no server yet.

        Args:
            groups: their numbers.
            lengths: of the responses of each, tokens.
        """
        flat = np.array([length for each in lengths for length in each], dtype=float)
        count = len(flat)
        group = np.repeat(np.array(groups, dtype=np.int64), [len(each) for each in lengths])
        nowhere = np.full(count, NOWHERE, dtype=np.int32)
        return cls(group, flat, nowhere, np.full(count, np.nan), np.ones(count, dtype=bool))

    def __len__(self) -> int:
        return len(self.group)

    @property
    def starts(self) -> ndarray:
        """Index of the first entry of each group."""
        if not len(self):
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(np.diff(self.group, prepend=self.group[0] - 1))

    def select(self, which: ndarray) -> "Requests":
        """Those of an index or a mask."""
        return Requests(*(getattr(self, each.name)[which] for each in fields(self)))

    def followed_by(self, other: "Requests") -> "Requests":
        """Both, one after the other."""
        pairs = ((getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        return Requests(*(np.concatenate(pair) for pair in pairs))

    def indices_on(self, server: int) -> ndarray:
        """Index of what `server` has running or in its queue."""
        return np.flatnonzero(self.is_live & (self.server == server))


@dataclass
class Servers:
    """One entry for each server.

    Args:
        factor: float64, speed as a share of the curve's.
        speeds: float64, tokens/s of one request by how many are decoded at once; the last entry is a server's slots.
        progress: float64, tokens that a request there since ever would have.
        at: float64, seconds at which `progress` was right; in the future while it reads requests in again.
        is_up: bool.
    """

    factor: ndarray
    speeds: ndarray
    progress: ndarray
    at: ndarray
    is_up: ndarray

    @classmethod
    def of(cls, factor: ndarray, speeds: list[float]) -> "Servers":
        """Servers at second 0, all up."""
        count = len(factor)
        return cls(factor, np.array(speeds), np.zeros(count), np.zeros(count), np.ones(count, dtype=bool))

    def __len__(self) -> int:
        return len(self.factor)

    @property
    def slots(self) -> int:
        """Requests that a server decodes at once, at most."""
        return len(self.speeds) - 1

    def least_loaded(self, loads: ndarray, count: int) -> tuple[ndarray, ndarray]:
        """Where `count` requests go, one after the other to the server that has the fewest by then.

        Args:
            loads: requests of each server.
            count: at least 1; a server is up.

        Returns:
            The server of each, and how many requests that has before it.
        """
        up = np.flatnonzero(self.is_up)
        load = loads[up]
        # The smallest level at which there is room for all: the last requests stand on it.
        ordered = np.sort(load)
        room = ordered * np.arange(1, len(up) + 1) - np.cumsum(ordered)
        full = int(np.searchsorted(room, count, side="left"))  # servers that get any, when the next would be as full
        level = -(-(count + int(ordered[:full].sum())) // full)
        free = np.maximum(level - load, 0)
        server = np.repeat(up, free)
        before = np.arange(len(server)) - np.repeat(np.cumsum(free) - free, free) + np.repeat(load, free)
        order = np.lexsort((server, before))[:count]
        return server[order].astype(np.int32), before[order]
