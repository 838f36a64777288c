"""A checkpoint is whole or absent: written beside, listed with checksums, renamed, and only then pointed to.

    <default_local_dir>/.incomplete/global_step_N      verl and we write here
    <default_local_dir>/global_step_N                  renamed when everything is on disk, manifest.json included
    <default_local_dir>/latest_checkpointed_iteration.txt    replaced last; verl resumes from what it names

A crash at any moment leaves the pointer on a checkpoint that is whole, or leaves none where there was none.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from verl_m2po.ground.files import sync_folder, write_durably

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

POINTER = "latest_checkpointed_iteration.txt"
"""verl's name for it: the step that `trainer.resume_mode=auto` resumes from."""

INCOMPLETE = ".incomplete"

WHOLE_HASH_BYTES = 64 * 2**20
"""Files up to this size are hashed whole; of larger ones `BLOCKS` blocks of `BLOCK_BYTES`, evenly spread.

That finds every truncated file and every file of another checkpoint at a bounded cost per shard. It does not find a
single flipped bit between the blocks.
"""

BLOCKS = 64
BLOCK_BYTES = 2**20

FOLDER = re.compile(r"^global_step_(\d{1,18})$", re.ASCII)
_STEP = re.compile(r"^\d{1,18}$", re.ASCII)

LONGEST_SHOWN = 40
"""Characters of a broken pointer that an error repeats."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or must not be loaded."""


def folder_name(step: int) -> str:
    """verl's name of the checkpoint after trainer step `step`."""
    return f"global_step_{step}"


def fingerprint(path: Path) -> str:
    """sha256 of a file's content, or of evenly spread blocks of it where it exceeds `WHOLE_HASH_BYTES`."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if size <= WHOLE_HASH_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        else:
            for i in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    """Force a file to disk, whoever wrote it, and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": fingerprint(path)}


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    return {str(path.relative_to(folder)): path for path in sorted(paths)}


def seal(folder: Path, step: int) -> None:
    """Write the manifest of everything in `folder`, and force all of it to disk."""
    files = _files(folder)
    with ThreadPoolExecutor() as pool:
        described = dict(zip(files, pool.map(_describe, files.values()), strict=True))
    write_durably(
        folder / MANIFEST, json.dumps({"format": MANIFEST_FORMAT, "step": step, "files": described}, indent=1)
    )
    for subfolder in {path.parent for path in files.values()}:
        sync_folder(subfolder)


def flaws(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in `folder`, one clause per file; empty if it is whole.

    Files that the manifest does not list are no flaw: nothing loads them.
    """
    try:
        step, listed = _read_manifest(folder / MANIFEST)
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"]
    if folder.name != folder_name(step):
        return [f"{MANIFEST} is that of {folder_name(step)}"]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _flaw(folder / name, listed[name]), listed)
    return [f"{name} {flaw}" for name, flaw in zip(listed, found, strict=True) if flaw]


def _read_manifest(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """The step and the files that a manifest lists; raises ValueError, KeyError or TypeError where it is none."""
    manifest = json.loads(path.read_text())
    listed = manifest["files"]
    if not isinstance(listed, dict) or not listed:
        raise ValueError("it lists no file")
    for name, entry in listed.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"its entry for {name} lacks bytes or sha256")
    return manifest["step"], listed


def _flaw(path: Path, listed: dict[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != listed["bytes"]:
        return f"has {size} bytes, {listed['bytes']} were written"
    if fingerprint(path) != listed["sha256"]:
        return "is not the file that was written: its sha256 differs"
    return None


class Checkpoints:
    """The checkpoints of a run.

    Args:
        root: verl's `trainer.default_local_dir`; every node must see the same files there.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()

    def steps(self) -> list[int]:
        """Trainer steps with a folder of their own, whole or not, in order."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in map(FOLDER.match, names) if match)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of trainer step `step` lies, or would lie."""
        return self.root / folder_name(step)

    def latest(self) -> Path | None:
        """What the pointer names; None without a pointer, where a run starts from scratch.

        Raises:
            CheckpointError: the pointer cannot be read, is no number, or names a folder that is not there.
        """
        pointer = self.root / POINTER
        if not pointer.exists():
            if steps := self.steps():
                logger.warning(
                    "%s is not there, so the run starts from scratch, although %s exists. To resume: "
                    "trainer.resume_mode=resume_path trainer.resume_from_path=%s",
                    pointer,
                    folder_name(steps[-1]),
                    self.folder(steps[-1]),
                )
            return None
        try:
            text = pointer.read_text(errors="replace").strip()
        except OSError as error:
            raise CheckpointError(f"{pointer} cannot be read ({_reason(error)}). {self._advice()}") from error
        if not _STEP.match(text):
            shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
            raise CheckpointError(f"{pointer} holds {shown!r}, not a trainer step. {self._advice()}")
        folder = self.folder(int(text))
        if not folder.is_dir():
            raise CheckpointError(f"{pointer} names {folder}, which is not there. {self._advice(int(text))}")
        return folder

    def require_whole(self, folder: Path) -> None:
        """Refuse to load what is not exactly what was written.

        Raises:
            CheckpointError: naming each file that differs, and the other checkpoints that are whole.
        """
        if found := flaws(folder):
            shown = "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
            match = FOLDER.match(folder.name)
            raise CheckpointError(
                f"the checkpoint {folder} is not whole: {shown}. "
                f"Nothing was loaded or changed. {self._advice(int(match[1]) if match else None)}"
            )

    def _advice(self, broken_step: int | None = None) -> str:
        whole = [step for step in self.steps() if step != broken_step and not flaws(self.folder(step))]
        if not whole:
            return "No other checkpoint here is whole; trainer.resume_mode=disable starts from scratch"
        others = ", ".join(map(folder_name, whole))
        return (
            f"Whole are: {others}. To go on from the newest of them: trainer.resume_mode=resume_path "
            f"trainer.resume_from_path={self.folder(whole[-1])}"
        )

    def require_writable(self) -> None:
        """Find out now, not after hours, whether checkpoints can be written here.

        Raises:
            CheckpointError: they cannot.
        """
        try:
            (self._empty_incomplete() / "probe").write_text("")
            shutil.rmtree(self.root / INCOMPLETE)
        except OSError as error:
            raise CheckpointError(
                f"trainer.default_local_dir={self.root}: no checkpoint can be written there ({_reason(error)}). Make "
                "it writable, set another folder, or trainer.save_freq=-1 to write none"
            ) from error

    def _empty_incomplete(self) -> Path:
        """The folder in which checkpoints are written, without what a crash left there."""
        incomplete = self.root / INCOMPLETE
        if incomplete.exists():
            shutil.rmtree(incomplete)
        incomplete.mkdir(parents=True)
        return incomplete

    @contextmanager
    def writing(self, step: int, resumed_from: Path | None = None) -> Iterator[Path]:
        """Write the checkpoint of `step` into `global_step_N` of the folder that this yields; it counts at the end.

        Args:
            step: trainer step.
            resumed_from: the checkpoint that this run went on from; the pointer returns to it for the moment in which
                an existing checkpoint of `step`, left by a run that was rewound, is replaced.

        Raises:
            CheckpointError: anything went wrong; the earlier checkpoints and the pointer are as they were.
        """
        incomplete = self.root / INCOMPLETE
        try:
            self._empty_incomplete()
            (incomplete / folder_name(step)).mkdir()
            yield incomplete
            seal(incomplete / folder_name(step), step)
            self._install(incomplete / folder_name(step), step, resumed_from)
        except Exception as error:
            shutil.rmtree(incomplete, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint after trainer step {step} could not be written to {self.root}: {_reason(error)}. "
                f"{self._last_words()}"
            ) from error

    def _last_words(self) -> str:
        try:
            latest = self.latest()
        except CheckpointError:
            latest = None
        if latest is None:
            return "There is no earlier checkpoint"
        return f"{latest.name} is untouched: the same command goes on from there once the cause is removed"

    def _install(self, written: Path, step: int, resumed_from: Path | None) -> None:
        final = self.folder(step)
        if final.exists():
            self._point_away_from(step, resumed_from)
            os.rename(final, written.parent / f"replaced_{final.name}")
        os.rename(written, final)
        sync_folder(self.root)
        write_durably(self.root / POINTER, str(step))
        shutil.rmtree(written.parent, ignore_errors=True)

    def _point_away_from(self, step: int, resumed_from: Path | None) -> None:
        pointer = self.root / POINTER
        if not pointer.exists() or pointer.read_text().strip() != str(step):
            return
        match = FOLDER.match(resumed_from.name) if resumed_from and resumed_from.parent == self.root else None
        if match and int(match[1]) != step:
            write_durably(pointer, match[1])
        else:
            pointer.unlink()

    def prune(self, step: int, keep: int | None) -> None:
        """Delete the oldest of our checkpoints, so that `keep` remain.

        Args:
            step: the trainer step just written; later ones are those of a run that was rewound, and stay.
            keep: None or below 1 keeps all.
        """
        if keep is None or keep < 1:
            return
        ours = [other for other in self.steps() if other <= step and (self.folder(other) / MANIFEST).exists()]
        for other in ours[:-keep]:
            doomed = self.root / INCOMPLETE / folder_name(other)
            doomed.parent.mkdir(exist_ok=True)
            os.rename(self.folder(other), doomed)  # at once: a half-deleted one must not look like a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The error at the bottom, in one line: Ray wraps what a worker raised."""
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1].strip() if lines else 'no message'}"
