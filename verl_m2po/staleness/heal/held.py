"""The weights that the rollout holds, while the actor makes others of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HELD, PRESENT = "held by the rollout", "present"
"""Names of two copies of the actor's weights, in its workers."""


class HeldWeights:
    """A copy in host memory, made before the first update after a push.

    Args:
        actor: verl's worker group of the actor, of the class `DetachActorWorker`.
        keeps: make the copy; otherwise they are at hand only until the first update.
    """

    def __init__(self, actor: Any, keeps: bool) -> None:
        self._actor, self._keeps = actor, keeps
        self._has_moved = False

    def before_update(self) -> None:
        """The actor is about to leave them, or has left them already."""
        if not self._has_moved and self._keeps:
            self._actor.save_model_to_cpu(HELD)
        self._has_moved = True

    def are_pushed(self) -> None:
        """The rollout holds the actor's present weights."""
        self._has_moved = False

    @property
    def are_at_hand(self) -> bool:
        """Whether they can be pushed now."""
        return self._keeps or not self._has_moved

    @contextmanager
    def in_actor(self) -> Iterator[None]:
        """The actor has them in the block, and its own afterwards."""
        if not self._has_moved:
            yield
            return
        self._actor.save_model_to_cpu(PRESENT)
        self._actor.restore_model_from_cpu(HELD)
        try:
            yield
        finally:
            self._actor.restore_model_from_cpu(PRESENT)
            self._actor.clear_cpu_model(PRESENT)
