"""Groups that were trained and may be trained again: which of them a batch is given. Pure, like the rules."""

import copy
import heapq
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from verl_m2po.staleness.rule.records import Group
from verl_m2po.staleness.rule.worth import Judge, Outcome

SAMPLING = ("uniform", "newest", "informative", "positive")
"""How `Pool.draw` chooses."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """How often a rollout is trained.

    Args:
        max_uses: trainer steps that may train on the same group; 1 trains each once, None sets no limit beside its age.
        first_uses: groups of every batch, at least, that were not trained before.
        sampling: how the other groups of a batch are chosen. `uniform`: each that may be trained again with the same
            probability. `newest`: those that were generated last. `informative`: uniform over the groups that had an
            advantage. `positive`: uniform over the groups with a success.
        seed: seed of the choice.

    Raises:
        ValueError: a value that nothing can honour.
    """

    max_uses: int | None
    first_uses: int
    sampling: str = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first_uses < 1 or (self.max_uses is not None and self.max_uses < 1):
            raise ValueError(f"max_uses={self.max_uses} and first_uses={self.first_uses} must be at least 1")
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling={self.sampling!r} is none of {', '.join(SAMPLING)}")

    def allows_after(self, uses: int) -> bool:
        """Whether a group that was trained `uses` times may be trained again."""
        return self.max_uses is None or uses < self.max_uses


@dataclass(slots=True)
class _Trained:
    """A group, and how often it was trained."""

    group: Group
    uses: int

    @property
    def order(self) -> tuple[int, int]:
        """By the version of its oldest token, then in the order of dispatch."""
        return self.group.min_version, self.group.ticket.place


class Pool:
    """Groups that were trained at least once and may be again, each at most once at one weight version.

    A draw costs O(log depth) for each group. The n-th draw of a run depends on the seed, on n and on what is in the
    pool, so that a run that was restarted draws what the uninterrupted one would.

    Args:
        reuse: how often a group is trained, and how groups are chosen.
        oldest_usable: the oldest weight version that may be trained when training starts from the given one.
    """

    def __init__(self, reuse: Reuse, oldest_usable: Callable[[int], int]) -> None:
        self.reuse = reuse
        self._oldest_usable = oldest_usable
        self._version = -1
        self._draws = 0
        self._drawable: list[_Trained] = []
        self._place: dict[str, int] = {}
        self._resting: list[_Trained] = []
        self._by_age: list[tuple[int, int, str]] = []
        self._by_youth: list[tuple[int, int, str]] = []
        self._retired: list[Group] = []
        self.judge = Judge(reuse.sampling)
        self._unjudged: set[str] = set()

    def drawable(self, version: int) -> int:
        """Groups that may be drawn when training starts from weight `version`, which never decreases from call to call.

        Raises:
            ValueError: `judged` was not called for the batch before, and `sampling` depends on it.
        """
        if version > self._version:
            if self._unjudged:
                raise ValueError(f"sampling={self.reuse.sampling}: the last batch was trained and not judged")
            self._version = version
            for trained in self._resting:
                self._add(trained)
            self._resting = []
            self._expire(self._oldest_usable(version))
        return len(self._drawable)

    def _expire(self, oldest_version: int) -> None:
        while self._by_age and self._by_age[0][0] < oldest_version:
            uid = heapq.heappop(self._by_age)[2]
            if uid in self._place:  # otherwise it was drawn since
                self._retired.append(self._remove(self._place[uid]).group)

    def _add(self, trained: _Trained) -> None:
        uid, (version, place) = trained.group.ticket.uid, trained.order
        self._place[uid] = len(self._drawable)
        self._drawable.append(trained)
        heapq.heappush(self._by_age, (version, place, uid))
        if self.reuse.sampling == "newest":
            heapq.heappush(self._by_youth, (-version, -place, uid))

    def _remove(self, index: int) -> _Trained:
        """Take out what is at `index`; the last one moves there."""
        removed, last = self._drawable[index], self._drawable.pop()
        del self._place[removed.group.ticket.uid]
        if last is not removed:
            self._drawable[index] = last
            self._place[last.group.ticket.uid] = index
        return removed

    def first_used(self, groups: list[Group], version: int) -> list[str]:
        """`groups` are trained for the first time, from weight `version`; the uids of those that may be so again."""
        self.drawable(version)
        return self._rest([_Trained(group, 1) for group in groups])

    def _rest(self, used: list[_Trained]) -> list[str]:
        """Keep those that may be trained from a later version."""
        oldest_next = self._oldest_usable(self._version + 1)
        staying = [
            trained
            for trained in used
            if self.reuse.allows_after(trained.uses) and trained.group.min_version >= oldest_next
        ]
        self._resting += staying
        if self.judge.is_needed:
            self._unjudged |= {trained.group.ticket.uid for trained in staying}
        return [trained.group.ticket.uid for trained in staying]

    def judged(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take what training the last batch showed, by uid; groups that `sampling` will not choose are given up."""
        self.judge.see(outcomes)
        given_up = {uid for uid in self._unjudged & outcomes.keys() if not self.judge.is_worth(outcomes[uid])}
        self._unjudged -= outcomes.keys()
        self._retired += [each.group for each in self._resting if each.group.ticket.uid in given_up]
        self._resting = [each for each in self._resting if each.group.ticket.uid not in given_up]

    def draw(self, count: int, version: int) -> tuple[list[Group], list[str]]:
        """`count` groups to train again from weight `version`, and the uids of those that may be trained yet again.

        Raises:
            ValueError: fewer than `count` groups are drawable.
        """
        if count > self.drawable(version):
            raise ValueError(f"{count} groups are to be trained again at version {version}, {len(self._drawable)} can")
        if not count:
            return [], []
        chance = random.Random(f"{self.reuse.seed}/{self._draws}")
        self._draws += 1
        drawn = []
        for _ in range(count):
            index = self._newest() if self.reuse.sampling == "newest" else chance.randrange(len(self._drawable))
            trained = self._remove(index)
            drawn.append(_Trained(trained.group, trained.uses + 1))
        return [trained.group for trained in drawn], self._rest(drawn)

    def expected(self, count: int, version: int) -> list[Group]:
        """What `draw` would return by what is known now, at most `count` groups; nothing is changed.

        Costs a copy of references to what is in the pool, and what the draw costs.
        """
        if version > self._version and self._unjudged:
            return []
        shadow = copy.copy(self)
        for name in ("_drawable", "_place", "_resting", "_by_age", "_by_youth", "_retired", "_unjudged"):
            setattr(shadow, name, copy.copy(getattr(self, name)))
        return shadow.draw(min(count, shadow.drawable(version)), version)[0]

    def _newest(self) -> int:
        while True:
            uid = heapq.heappop(self._by_youth)[2]
            if uid in self._place:
                return self._place[uid]

    def take_retired(self) -> tuple[Group, ...]:
        """Groups that since the last call became too old, or that `sampling` will not choose again."""
        retired, self._retired = tuple(self._retired), []
        return retired

    def groups(self) -> list[Group]:
        """All groups of the pool: their rows must be kept."""
        return [trained.group for trained in (*self._drawable, *self._resting)]

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON. Groups that became too old are left out: a restart deletes rows that nothing refers to."""

        def plain(trained: list[_Trained]) -> list[list[Any]]:
            return [[each.group.to_json(), each.uses] for each in trained]

        return {
            "version": self._version,
            "draws": self._draws,
            "judge": self.judge.state_dict(),
            "drawable": plain(self._drawable),
            "resting": plain(self._resting),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned, in a pool that holds nothing yet."""

        def loaded(plain: list[list[Any]]) -> list[_Trained]:
            return [_Trained(Group.from_json(group), uses) for group, uses in plain]

        self._version, self._draws = state["version"], state["draws"]
        self._drawable, self._place, self._by_age, self._by_youth, self._retired = [], {}, [], [], []
        for trained in loaded(state["drawable"]):
            self._add(trained)
        self._resting = loaded(state["resting"])
        if "judge" in state:  # an earlier version had none
            self.judge.load_state_dict(state["judge"])
