"""A time limit for what verl waits for without one: the start of the run's processes, and a push of weights.

Where a receiver of weights fails, verl's sender waits on a socket for ever, and so do all that wait for it. When the
time is over, the run ends with an error that says who does not answer, and the first error in a log of this machine.
"""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ray._private import worker

from verl_m2po.staleness.config import StaleKConfig
from verl_m2po.staleness.watch.liveness import Watch

logger = logging.getLogger(__name__)

ANSWER_S = 5.0
"""How long a process has to answer before it is named as one that does not."""

_ERROR = re.compile(r"\b[A-Za-z_][\w.]*(?:Error|Exception): \S.*")


@contextmanager
def time_limit(watch: Watch, timeout_s: float | None, key: str, what: str) -> Iterator[None]:
    """End the run if the block takes too long. Inside `watch.guard()`, in the main thread.

    Args:
        watch: what ends the run, and knows its processes by name.
        timeout_s: wall-clock seconds; None waits for ever.
        key: full name of the setting that says so.
        what: what the block does, in the user's words.
    """
    if timeout_s is None:
        yield
        return
    lock, logs = threading.Lock(), LogsSince(_logs_folder())
    has_ended = False

    def expire() -> None:
        silent = watch.find_silent(ANSWER_S)
        reason = f"{what} takes longer than {key}={timeout_s:g} seconds. {_said(silent, logs)}"
        with lock:
            if not has_ended:
                watch.end(reason)

    timer = threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            has_ended = True


class TimeLimits:
    """Those of a run.

    Args:
        watch: see `time_limit`.
        mode: the trainer mode.
        settings: its settings.
    """

    def __init__(self, watch: Watch, mode: str, settings: StaleKConfig) -> None:
        self._watch, self._key = watch, f"trainer.v1.{mode}"
        self._start_s, self._push_s = settings.start_timeout_s, settings.push_timeout_s

    def start(self) -> AbstractContextManager[None]:
        """Of starting the processes of the run."""
        what = "the start of the run's processes"
        return time_limit(self._watch, self._start_s, f"{self._key}.start_timeout_s", what)

    def push(self, version: int) -> AbstractContextManager[None]:
        """Of pushing weight version `version` to the rollout."""
        what = f"the push of weight version {version}"
        return time_limit(self._watch, self._push_s, f"{self._key}.push_timeout_s", what)


def _said(silent: list[str], logs: "LogsSince") -> str:
    """Who is silent, and what went wrong first."""
    who = f"No answer from: {', '.join(silent)}. " if silent else "Every process that is known still answers. "
    error = logs.first_error()
    if error is None:
        return f"{who}No error in the logs of this machine since; look at {logs.folder} on the others."
    return f"{who}The first error since, on this machine: {error}"


class LogsSince:
    """What the processes of this machine have logged from now on.

    Args:
        folder: of Ray's logs; None: unknown.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._sizes = {file: file.stat().st_size for file in self._files()}

    def _files(self) -> list[Path]:
        """Logs of workers, the one that was written to first at the front."""
        if self.folder is None:
            return []
        return sorted(self.folder.glob("worker-*"), key=lambda file: file.stat().st_mtime)

    def first_error(self) -> str | None:
        """The first line that tells of an error, and the file it is in; None if there is none.

        Of several files, the one that was written to first: who failed is silent, who waits for it goes on.
        """
        for file in self._files():
            with file.open("rb") as stream:
                stream.seek(self._sizes.get(file, 0))
                found = _ERROR.search(stream.read().decode(errors="replace"))
            if found is not None:
                return f"{found[0]} ({file})"
        return None


def _logs_folder() -> Path | None:
    """Of the Ray cluster that this process is in."""
    node = worker._global_node
    return None if node is None else Path(node.get_logs_dir_path())
