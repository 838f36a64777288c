"""One run for each folder at a time: two would write their lines into one log."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".running"


class FolderInUse(RuntimeError):
    """Another process trains into the folder."""


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there; the kernel gives it back when the process dies.

    Raises:
        FolderInUse: another process holds it; names that process and what to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FolderInUse(
                f"{folder} is being written by process {lock.read().strip() or 'unknown'}: wait for it, stop it, or "
                "give this run another trainer.experiment_name or --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
