"""Which lost groups are generated again, and which prompts are set aside since they kill: pure decisions."""

from collections import Counter, deque

CHANCE = 2
"""Processes that may die under a group by chance; then it is a suspect."""


class Suspects:
    """Groups that were lost with the processes that generated them.

    One death is chance, and the group is generated again at once. So may be two, or they are the work of a neighbour in
    the same processes: such groups are generated again one at a time, and one that is lost again, as the only suspect,
    is guilty. Nobody else waits for that.
    """

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()
        self._again: list[str] = []
        self._waiting: deque[str] = deque()
        self._tried: str | None = None

    def lose(self, uid: str, deaths: int) -> bool:
        """Group `uid` was lost. Whether it is guilty: it was tried as the only suspect.

        Args:
            deaths: of processes under it since it was dispatched last, at least 1.
        """
        if uid == self._tried:
            self.end(uid)
            return True
        self._deaths[uid] += deaths
        (self._again if self._deaths[uid] < CHANCE else self._waiting).append(uid)
        return False

    def end(self, uid: str) -> None:
        """Group `uid` has ended in any other way."""
        self._deaths.pop(uid, None)
        if uid == self._tried:
            self._tried = None

    def due(self) -> list[str]:
        """Groups to be generated again now; of the suspects one, when the one before has ended."""
        due, self._again = self._again, []
        if self._tried is None and self._waiting:
            self._tried = self._waiting.popleft()
            due.append(self._tried)
        return due
