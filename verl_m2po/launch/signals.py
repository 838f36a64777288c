"""The driver's side of ending a run: the first Ctrl-C or SIGTERM asks for a checkpoint, the second ends it at once.

How the trainer hears of it: `staleness/watch/stop.py`.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psutil
import ray

from verl_m2po.patches import ray as ray_patches
from verl_m2po.staleness.watch import stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)

SHARED_MEMORY = "/dev/shm"
SEGMENTS = ("sem.mp-", "psm_", "torch_", "verl_weights_")
"""How names in there begin that belong to the processes which map them. Others, a model for example, may not."""


class Listener:
    """The driver's side: hands the first signal on, and leaves at the second.

    A run that has not begun to train has nothing to save: it leaves at the first.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._others: set[psutil.Process] = set()
        self._handlers: dict[signal.Signals, Any] = {}

    def start(self) -> None:
        """Listen from now on. Only the main thread of a process may."""
        self._others = set(psutil.Process().children(recursive=True))
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        self._take_signals()
        ray_patches.after_init(self._take_signals)
        ray_patches.give_daemons_a_session()

    def _take_signals(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def stop(self, tell_status: bool = True) -> None:
        """Listen no more, close Ray and leave nothing of the run behind.

        Args:
            tell_status: end with the status that shells expect after a signal, if there was one.

        Raises:
            SystemExit: there was.
        """
        ray_patches.no_longer_after_init(self._take_signals)
        left = _Left.besides(self._others)
        ray.shutdown()
        left.remove(grace_s=10.0)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if tell_status and self.received is not None:
            raise SystemExit(128 + self.received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None or not ray.is_initialized():
            self._end_at_once(signal.Signals(number))
        self.received = signal.Signals(number)
        # Not here: the handler may have interrupted a call into Ray.
        threading.Thread(target=self._ask, args=(self.received,), daemon=True).start()

    def _ask(self, number: signal.Signals) -> None:
        if not stop.is_set(stop.TRAINING):
            self._end_at_once(number)
        _say(
            f"{number.name}: finishing the step and saving a checkpoint; the same command goes on from there. "
            "Send it again to leave at once"
        )
        stop.put(stop.STOP)

    def _end_at_once(self, number: signal.Signals) -> NoReturn:
        """End this process and all that it has started."""
        _say(f"{number.name}: leaving at once")
        _Left.besides(self._others).remove(grace_s=0.0)
        sys.stdout.flush()
        os._exit(128 + number)


@dataclass
class _Left:
    """What would outlive the driver: the processes that it started, and the shared memory that they use.

    Ray ends its processes when it is closed, but in a way that keeps them from unlinking the semaphores of Python's
    multiprocessing and, in the midst of a weight sync, verl's buffer of weights.
    """

    processes: list[psutil.Process]
    segments: set[Path]

    @classmethod
    def besides(cls, others: set[psutil.Process]) -> "_Left":
        """What the driver has started, without `others`."""
        processes = [process for process in psutil.Process().children(recursive=True) if process not in others]
        return cls(processes, _segments(process.pid for process in processes))

    def remove(self, grace_s: float) -> None:
        """Give the processes `grace_s` seconds to end, then kill them; remove their shared memory."""
        _, alive = psutil.wait_procs(self.processes, timeout=grace_s)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for segment in self.segments:
            segment.unlink(missing_ok=True)


def _segments(pids: Iterable[int]) -> set[Path]:
    """Shared memory that Python, torch or verl made and one of these processes maps. Linux only, elsewhere none."""
    # By inode: a semaphore is mapped under the temporary name that it had before it got its own.
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                if SHARED_MEMORY in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    found = set()
    for path in Path(SHARED_MEMORY).glob("*") if inodes else ():
        with contextlib.suppress(OSError):
            if path.name.startswith(SEGMENTS) and path.stat().st_ino in inodes:
                found.add(path)
    return found


def _say(message: str) -> None:
    print(f"verl-m2po: {message}", file=sys.stderr, flush=True)
