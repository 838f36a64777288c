"""Training devices lent to the rollout: their servers pass the version gate too, but have no successor if they die."""

from collections.abc import Sequence
from typing import Any

from verl_m2po.staleness.watch.liveness import WorkerDied


class Lent:
    """Who takes part in a push to the servers on the training devices; see `pushing.Attendance`.

    verl lends the devices between two trainer steps (`hybrid_rollout.enable_switch`), and for a validation.
    """

    def takes_part(self, replica: Any) -> bool:
        """All do: each shares its processes with the trainer, and is as much a part of the run."""
        return True

    def lose(self, replica: Any, reason: str) -> None:
        """The run ends.

        Raises:
            WorkerDied: always.
        """
        raise WorkerDied(f"rollout server {replica.server_address} on the training devices: {reason}")

    def explain(self, attempted: Sequence[Any], error: Exception) -> bool:
        """Nothing of a push that failed is made again."""
        return False

    def admit(self, replicas: Sequence[Any]) -> None:
        """verl gives them work when it has resumed them."""
