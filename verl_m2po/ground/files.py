"""Replacing a file at once: written beside, forced to disk, then renamed. A reader sees the old file or the new."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to, beside `path`, whose place the file then takes; after an error it is removed.

    Args:
        path: the file; its folder must exist.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except Exception:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Replace `path` by a file that holds `text`, UTF-8."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Force the names in `folder` to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, text: str) -> None:
    """Append `text` to the file at `path`; it has reached the operating system on return.

    Raises:
        OSError: It cannot be written; names the file, which Python does not of a full disk.
    """
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError as error:
        what_to_do = "make room or allow it, and start again: the run goes on from its last checkpoint"
        raise OSError(error.errno, f"{error.strerror}; {what_to_do}", str(path)) from error
