"""Counting failed generations, and stopping a run in which too many of them fail."""

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.records import Group


class TooManyFailures(RuntimeError):
    """More of the recent prompt groups failed than the run is willing to replace."""


class FailureWindow:
    """Stops the run when more than a share of the last groups failed.

    A group that is trained with some of its trajectories masked counts as that share of a failed group: the run stops
    at the same share of failed trajectories, whether they are replaced or masked.

    Args:
        max_failed_fraction: share of the window that may fail; 1 never stops the run.
        window: how many of the last groups are looked at. The run is not stopped before that many have ended.
    """

    def __init__(self, max_failed_fraction: float = 0.2, window: int = 100) -> None:
        self.max_failed_fraction = max_failed_fraction
        self._failed: deque[float] = deque(maxlen=window)
        self._errors: deque[str] = deque(maxlen=window)

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`.

        Raises:
            TooManyFailures: as for `failed`.
        """
        match event:
            case events.Returned(group):
                self.kept(group.masked_share)
            case events.Finished(group, report):
                self.kept(group.masked_share, report.masked_errors)
            case events.SetAside(ticket, report):
                self.kept(Group(ticket, report.rows).masked_share, report.masked_errors)
            case events.Failed(_, report) if report.error is not None and not report.was_aborted:
                self.failed(report.error)

    def kept(self, masked_share: float = 0.0, errors: Sequence[str] = ()) -> None:
        """Count a group that is trained on.

        Args:
            masked_share: share of its trajectories that failed, and were masked.
            errors: what the failed trajectories reported.

        Raises:
            TooManyFailures: as for `failed`.
        """
        self._failed.append(masked_share)
        self._errors.extend(errors)
        if masked_share:
            self._judge()

    def failed(self, error: str) -> None:
        """Count a failed group.

        Raises:
            TooManyFailures: the window is full, and more than `max_failed_fraction` of it failed.
        """
        self._failed.append(1.0)
        self._errors.append(error)
        self._judge()

    def _judge(self) -> None:
        # Exact: a sum of shares that is rounded up would stop a run at its limit.
        failures, window = math.fsum(self._failed), self._failed.maxlen or 0
        if len(self._failed) == window and failures > self.max_failed_fraction * window:
            distinct = "\n".join(f"  {times} x {error}" for error, times in Counter(self._errors).most_common())
            raise TooManyFailures(
                f"{failures:g} of the last {window} prompt groups failed, more than max_failed_fraction="
                f"{self.max_failed_fraction} allows (one with masked trajectories counts as their share of it). What "
                f"they reported, each once:\n{distinct}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs to go on counting, as plain JSON."""
        return {"failed": list(self._failed), "errors": list(self._errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`; if its window was longer, from the last groups of it."""
        self._failed.extend(state["failed"])
        self._errors.extend(state["errors"])
