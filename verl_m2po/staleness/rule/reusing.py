"""What rules that train a group several times share: the pool of groups that were trained and may be again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from verl_m2po.staleness.rule.imitation import Imitation, Recalibration
from verl_m2po.staleness.rule.records import Group
from verl_m2po.staleness.rule.reuse import Pool, Reuse
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.worth import Outcome


class Reusing(StalenessRule):
    """A rule with a pool of groups that were trained and may be again. A mixin: listed before the rule that it extends.

    Args:
        reuse: how often a group is trained, and which groups are trained again.
        imitation: how the advantages of groups that are trained again are formed anew.
        of_rule: positional arguments of the rule that is extended.
        named: its named arguments.

    Raises:
        ValueError: more first uses than a batch has groups.
    """

    def __init__(self, *of_rule: Any, reuse: Reuse, imitation: Imitation | None = None, **named: Any) -> None:
        super().__init__(*of_rule, **named)
        if reuse.first_uses > self.batch_size:
            raise ValueError(f"first_uses={reuse.first_uses} of a batch of {self.batch_size} groups")
        self.pool = Pool(reuse, self.oldest_reusable)
        self.recalibration = Recalibration(Imitation() if imitation is None else imitation)
        self._replayed_uids: frozenset[str] = frozenset()

    def oldest_reusable(self, version: int) -> int:
        """The oldest weight version of which a group may be trained again when training starts from `version`."""
        return self.oldest_usable(version)

    @property
    def needs_outcomes(self) -> bool:
        return self.pool.judge.is_needed

    def judge(self, outcomes: Mapping[str, Outcome]) -> None:
        self.pool.judged(outcomes)
        first = [outcome.mean_score for uid, outcome in outcomes.items() if uid not in self._replayed_uids]
        self.recalibration.add(first)

    def _use(self, first: list[Group], count: int, version: int) -> tuple[list[Group], frozenset[str]]:
        """Train `first` for the first time from `version`, and `count` from the pool: these, and the uids of both that
        may be trained yet again."""
        drawn, kept = self.pool.draw(count, version)
        kept += self.pool.first_used(first, version)
        self._replayed_uids = frozenset(group.ticket.uid for group in drawn)
        return drawn, frozenset(kept)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "reuse": asdict(self.pool.reuse),
            "pool": self.pool.state_dict(),
            "baseline": self.recalibration.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        reuse = asdict(self.pool.reuse)
        # The seed may be another, as that of the data may: what is drawn from now on is then other.
        if ((state.get("reuse") or {}) | {"seed": reuse["seed"]}) != reuse:
            raise ValueError(
                f"the checkpoint was written with {state.get('reuse')}, this run reuses rollouts as {reuse}. "
                "Resume with the old settings of replay, or start a new run"
            )
        self.pool.load_state_dict(state["pool"])
        self.recalibration.load_state_dict(state.get("baseline", []))  # an earlier version had none


def spread(first: list[Group], drawn: list[Group]) -> tuple[Group, ...]:
    """The groups of `first` evenly among those of `drawn`, both in their order: each mini-batch gets its share."""
    count, ahead, behind = len(first) + len(drawn), iter(first), iter(drawn)
    is_first = [(i + 1) * len(first) // count > i * len(first) // count for i in range(count)]
    return tuple(next(ahead) if here else next(behind) for here in is_first)
