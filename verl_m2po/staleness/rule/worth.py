"""Which groups are worth being trained again, by what their first training showed. Pure, like the rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """What training a group showed of it.

    Args:
        mean_score: mean score of its trajectories, before any penalty.
        has_advantage: some token's advantage is not 0.
        has_success: some trajectory's score is above 0, and its advantage too.
        has_score: some trajectory's score is above 0.
    """

    mean_score: float
    has_advantage: bool
    has_success: bool
    has_score: bool


class NothingSucceeds(RuntimeError):
    """A run is to imitate its own successes, and no trajectory has ever succeeded."""


BATCHES_TO_A_SUCCESS = 10
"""Batches in which no score is above 0, from the start of a run, after which none is expected."""


class Judge:
    """Says by `sampling` which groups are drawn again, and ends a run that imitates what never happens.

    Args:
        sampling: with `informative` a group must have an advantage to be drawn again, with `positive` a success; the
            other values require nothing.
    """

    def __init__(self, sampling: str) -> None:
        self._sampling = sampling
        self._batches = 0
        self._has_score = False

    @property
    def is_needed(self) -> bool:
        """Whether groups must be judged before they are drawn again."""
        return self._sampling in ("informative", "positive")

    def is_worth(self, outcome: Outcome) -> bool:
        """Whether a group may be drawn again."""
        return outcome.has_success if self._sampling == "positive" else outcome.has_advantage

    def see(self, outcomes: Mapping[str, Outcome]) -> None:
        """Take what training a batch showed, by uid.

        Raises:
            NothingSucceeds: with `positive`, the first `BATCHES_TO_A_SUCCESS` batches had no score above 0.
        """
        self._batches += 1
        self._has_score = self._has_score or any(outcome.has_score for outcome in outcomes.values())
        if self._sampling == "positive" and not self._has_score and self._batches >= BATCHES_TO_A_SUCCESS:
            raise NothingSucceeds(
                f"replay.sampling=positive trains trajectories with a score above 0 again, and none of the first "
                f"{self._batches} batches has one. If the rewards of this task are never positive, shift them; "
                "otherwise set replay.sampling=informative"
            )

    def state_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"batches": self._batches, "has_score": self._has_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._batches, self._has_score = state["batches"], state["has_score"]
