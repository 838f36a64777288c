"""Bounded staleness with replay: where generation is late, a batch is filled with what was trained before."""

from collections.abc import Sequence
from typing import Any

from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.records import Group, Selection
from verl_m2po.staleness.rule.reuse import Reuse
from verl_m2po.staleness.rule.reusing import Reusing, spread


class BoundedReplay(Reusing, BoundedAsync):
    """`BoundedAsync`, whose trainer does not wait for generation while it may train a rollout again.

    Groups that wait for their first use are trained first, the oldest before the others: a whole batch of them where
    there is one. Only what is missing in the batch then comes from the pool of groups that were trained before, and of
    every batch at least `reuse.first_uses` groups are new. A group is trained again only as a whole: a group with a
    token over the bound is not trained again.

    Generation is paced as without replay under a bound of `ahead_steps`: however wide the window of what is trained
    again, a group that is finished waits for its first use no longer than that and one step.

    Args:
        staleness_steps: largest age of what is trained, in trainer steps.
        batch_size: prompt groups per trainer step.
        reuse: how often a group is trained, and which groups are trained again.
        ahead_steps: trainer steps that generation may run ahead; None: `staleness_steps`.
        more: further arguments of `BoundedAsync` and `Reusing`.
    """

    name = "bounded_replay"

    def __init__(
        self, staleness_steps: int, batch_size: int, reuse: Reuse, ahead_steps: int | None = None, **more: Any
    ) -> None:
        super().__init__(staleness_steps, batch_size, reuse=reuse, **more)
        self.ahead_steps = staleness_steps if ahead_steps is None else ahead_steps
        if not 0 <= self.ahead_steps <= staleness_steps:
            raise ValueError(f"ahead_steps is {ahead_steps}; it is at most staleness_steps, {staleness_steps}")

    def _horizon(self, version: int) -> int:
        return min(version + self.ahead_steps + 1, super()._horizon(version))

    def stored_groups(self) -> list[Group]:
        return [*self._waiting(), *self.pool.groups()]

    def _least_new(self, count: int) -> int:
        """New groups of a mini-batch: its share of them, rounded up."""
        return -(-self.pool.reuse.first_uses * count // self.batch_size)

    def expected(self, version: int, count: int) -> Sequence[Group]:
        first = super().expected(version, count)
        return [*first, *self.pool.expected(count - max(len(first), self._least_new(count)), version)]

    def select(self, version: int, count: int) -> Selection | None:
        least = max(self._least_new(count), count - self.pool.drawable(version))
        first, evicted = self._take(least, count, version)
        retired = self.pool.take_retired()
        if len(first) < least:
            return Selection((), None, tuple(evicted), retired=retired) if evicted or retired else None
        drawn, kept = self._use(first, count - len(first), version)
        self._trained += count
        return Selection(
            spread(first, drawn),
            self._masks_before(first, version),
            tuple(evicted),
            kept=kept,
            retired=retired,
            replayed=self._replayed_uids,
        )
