"""Being asked to end: what the trainer notices, and when.

The signal reaches the driver (`launch/signals.py`); the training loop runs in an actor of Ray's, perhaps on another
machine. Between them is one key in the key-value store that every Ray cluster has, so that nothing runs, listens or
polls for it: the trainer reads the key once per step, and once per second while it waits for rollouts.
"""

import functools
import logging
import time
from collections.abc import Callable

import ray
from ray.experimental import internal_kv

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
"""While the trainer waits: how often it looks for a request."""

_NAMESPACE = b"verl_m2po"
TRAINING, STOP, STEP = "training", "stop", "step"
"""Keys of the store: the run has something to save; the run is asked to end; the trainer step that it has come to."""


class StopRequested(Exception):
    """The run was asked to end, and what it waits for does not come within the time that it was given."""


def _key(what: str) -> bytes:
    return f"{what}/{ray.get_runtime_context().get_job_id()}".encode()


def is_set(what: str) -> bool:
    """Whether `what` was put into Ray's store by any process of this job."""
    return bool(internal_kv._internal_kv_exists(_key(what), namespace=_NAMESPACE))


def put(what: str, value: int = 1) -> None:
    """Put `what` into Ray's store, where every process of this job sees it."""
    internal_kv._internal_kv_put(_key(what), str(value).encode(), namespace=_NAMESPACE)


def get(what: str) -> int | None:
    """What was put into Ray's store as `what` last; None for nothing."""
    value = internal_kv._internal_kv_get(_key(what), namespace=_NAMESPACE)
    return None if value is None else int(value)


class StopRequest:
    """The trainer's side: whether the run was asked to end, and for how long it may still wait for rollouts.

    Args:
        wait_s: seconds after which a wait for rollouts is given up once the run was asked to end; None waits as long as
            they take.
        look: returns whether the run was asked to end; None asks Ray.
    """

    def __init__(self, wait_s: float | None, look: Callable[[], bool] | None = None) -> None:
        self._wait_s = wait_s
        self._look = look or functools.partial(is_set, STOP)
        self._looked_at = -CHECK_EVERY_S
        self._seen_at: float | None = None

    def announce_training(self) -> None:
        """From now on there is something to save."""
        put(TRAINING)

    def is_made(self) -> bool:
        """Whether the run was asked to end."""
        if self._seen_at is None:
            self._looked_at = time.monotonic()
            if self._look():
                self._seen_at = self._looked_at
                logger.warning("the run was asked to end: saving a checkpoint as soon as this step allows it")
        return self._seen_at is not None

    def give_up_waiting_for(self, what: str) -> None:
        """Call it while waiting; cheap enough for every turn.

        Raises:
            StopRequested: the run was asked to end, and has waited for `wait_s` since.
        """
        if self._seen_at is None and (time.monotonic() - self._looked_at < CHECK_EVERY_S or not self.is_made()):
            return
        assert self._seen_at is not None
        if self._wait_s is not None and time.monotonic() - self._seen_at >= self._wait_s:
            raise StopRequested(f"the run was asked to end, and after another {self._wait_s:g} s {what}")
