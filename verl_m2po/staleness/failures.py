"""Counting failed generations, and stopping a run in which too many of them fail."""

from collections import Counter, deque
from typing import Any


class TooManyFailures(RuntimeError):
    """More of the recent prompt groups failed than the run is willing to replace."""


class FailureWindow:
    """Stops the run when more than a share of the last groups failed.

    Args:
        max_failed_fraction: share of the window that may fail; 1 never stops.
        window: how many of the last groups are looked at. Nothing is judged before that many have ended.
    """

    def __init__(self, max_failed_fraction: float = 0.2, window: int = 100) -> None:
        self.max_failed_fraction = max_failed_fraction
        self._failed: deque[bool] = deque(maxlen=window)
        self._errors: deque[str] = deque(maxlen=window)

    def succeeded(self) -> None:
        self._failed.append(False)

    def failed(self, error: str) -> None:
        """Count a failed group.

        Raises:
            TooManyFailures: the window is full, and more than `max_failed_fraction` of it failed.
        """
        self._failed.append(True)
        self._errors.append(error)
        failures, window = sum(self._failed), self._failed.maxlen or 0
        if len(self._failed) == window and failures > self.max_failed_fraction * window:
            distinct = "\n".join(f"  {times} x {error}" for error, times in Counter(self._errors).most_common())
            raise TooManyFailures(
                f"{failures} of the last {window} prompt groups failed, more than max_failed_fraction="
                f"{self.max_failed_fraction} allows. What they reported, each once:\n{distinct}"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs to go on counting, as plain JSON."""
        return {"failed": list(self._failed), "errors": list(self._errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`; of a longer window the last groups count."""
        self._failed.extend(state["failed"])
        self._errors.extend(state["errors"])
