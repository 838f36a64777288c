"""A journal on disk: what was dispatched and generated since the last checkpoint outlives a crash.

    <journal_path>/journal.json             which run the journal belongs to, and the checkpoint after which it begins
    <journal_path>/000007.events.jsonl      trainer: groups dispatched, dispatched again, failed; one JSON list a line
    <journal_path>/000007.worker-2.rows     agent loop worker 2: finished groups, packed, in frames

Every start and every checkpoint begins a new segment, with the next number. A checkpoint names its segment: what stands
in that one and in all later ones came after it. Segments that no checkpoint needs are deleted.

A frame is a magic word, the length and the crc32 of what follows: safetensors, whose metadata holds a group's JSON. A
frame that a crash cut off, or that does not fit its checksum, is dropped, and its group is generated again.
"""

import hashlib
import json
import logging
import os
import re
import struct
import threading
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from verl_m2po.staleness.restart.checkpoint import Checkpoints, write_durably
from verl_m2po.staleness.restart.resume import STATE_FILE
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.records import Row, Ticket

logger = logging.getLogger(__name__)

MAGIC = b"M2J1"
_FRAME = struct.Struct("<4sQI")

_SEGMENT_FILE = re.compile(r"^(\d{6,})\.(?:events\.jsonl|worker-\d+\.rows)$")

RUN_FILE = "journal.json"
"""Also the name of the file in a checkpoint that says where in the journal it stands."""


class JournalError(RuntimeError):
    """The journal cannot be written, or does not fit the run."""


@dataclass(frozen=True)
class FinishedGroup:
    """A finished group as its agent loop worker wrote it.

    Args:
        uid: verl's group id.
        rows: its trajectories.
        packed: their fields, see codec.py, in the order of `rows`.
    """

    uid: str
    rows: tuple[Row, ...]
    packed: tuple[dict[str, Any], ...]

    @property
    def newest_version(self) -> int:
        """The newest weight version that generated a token of it."""
        return max(row.max_version for row in self.rows)


def to_json(value: Any, where: str = "rest") -> Any:
    """`value` as plain JSON; what JSON does not have becomes an object with one key that begins with "$".

    Raises:
        JournalError: a type that is not stored, with the field that has it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, np.generic):
        return {"$scalar": [value.dtype.str, value.item()]}
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)):
        items = [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, np.ndarray):
        return {"$array": [value.dtype.str, list(value.shape), [to_json(v, where) for v in value.reshape(-1).tolist()]]}
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return {"$tensor": [name, list(value.shape), value.reshape(-1).tolist()]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(item, f"{where}.{key}") for key, item in value.items()}
        return {"$dict": [[to_json(k, where), to_json(v, f"{where}.{k}")] for k, v in value.items()]}
    raise JournalError(
        f"the journal cannot store {where} of type {type(value).__name__}, which the agent loop or the reward function "
        "returned: it stores what JSON, NumPy and torch have. Return that, or set journal=false"
    )


def from_json(value: Any) -> Any:
    """What `to_json` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$scalar": [dtype, item]}:
            return np.dtype(dtype).type(item)
        case {"$tuple": items}:
            return tuple(from_json(item) for item in items)
        case {"$array": [dtype, shape, items]}:
            array = np.empty(len(items), dtype=np.dtype(dtype))
            for i, item in enumerate(items):
                array[i] = from_json(item)
            return array.reshape(shape)
        case {"$tensor": [name, shape, items]}:
            return torch.tensor(items, dtype=getattr(torch, name)).reshape(shape)
        case {"$dict": pairs}:
            return {from_json(key): from_json(item) for key, item in pairs}
    return {key: from_json(item) for key, item in value.items()}


def encode(group: FinishedGroup) -> bytes:
    """`group` as safetensors: one tensor per field, that of all rows joined, and the rest as JSON metadata."""
    names = dict.fromkeys(name for row in group.packed for name in row if name != "rest")
    tensors, shapes = {}, {}
    for name in names:
        values = [row.get(name) for row in group.packed]
        shapes[name] = [None if value is None else list(value.shape) for value in values]
        tensors[name] = torch.cat([value.reshape(-1) for value in values if value is not None])
    about = {
        "uid": group.uid,
        "rows": [row.to_json() for row in group.rows],
        "shapes": shapes,
        "rest": [to_json(row["rest"]) for row in group.packed],
    }
    return save(tensors, metadata={"group": json.dumps(about, separators=(",", ":"))})


def _about(data: bytes) -> dict[str, Any]:
    header_bytes = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"]["group"])


def decode(data: bytes) -> FinishedGroup:
    """What `encode` was given."""
    about = _about(data)
    packed: list[dict[str, Any]] = [{"rest": from_json(rest)} for rest in about["rest"]]
    for name, joined in load(data).items():
        first = 0
        for row, shape in zip(packed, about["shapes"][name], strict=True):
            if shape is not None:
                size = int(np.prod(shape, dtype=np.int64))
                row[name] = joined[first : first + size].reshape(shape).clone()
                first += size
    return FinishedGroup(about["uid"], tuple(map(Row.from_json, about["rows"])), tuple(packed))


class RowsWriter:
    """Appends finished groups to one file; safe to call from several threads.

    Args:
        path: the file, which is created.
        fsync: wait until each group is on disk. Without it a group outlives a crash of any process, not of the machine.
    """

    def __init__(self, path: str | Path, fsync: bool) -> None:
        self._file = Path(path).open("ab", buffering=0)  # noqa: SIM115 (as long as the writer lives)
        self._fsync = fsync
        self._lock = threading.Lock()

    def append(self, group: FinishedGroup) -> None:
        """Write `group`.

        Raises:
            JournalError: it could not be written whole.
        """
        data = encode(group)
        frame = _FRAME.pack(MAGIC, len(data), zlib.crc32(data)) + data
        with self._lock:
            try:
                if self._file.write(frame) != len(frame):
                    raise OSError("written in part only")
                if self._fsync:
                    os.fsync(self._file.fileno())
            except OSError as error:
                raise JournalError(
                    f"the journal {self._file.name} cannot be written: {error}. Make room, or set another journal_path"
                ) from error


def read_frames(path: Path) -> Iterator[bytes]:
    """The whole frames of a file. A frame that is cut off ends it, one that does not fit its checksum is left out."""
    with path.open("rb") as file:
        while header := file.read(_FRAME.size):
            position = file.tell() - len(header)
            magic, length, crc = _FRAME.unpack(header) if len(header) == _FRAME.size else (b"", 0, 0)
            data = file.read(length) if magic == MAGIC else b""
            if magic != MAGIC or len(data) < length:
                logger.warning("%s: what stands after byte %d is no whole record, and is dropped", path, position)
                return
            if zlib.crc32(data) == crc:
                yield data
            else:
                logger.warning("%s: the record at byte %d does not fit its checksum, and is dropped", path, position)


@dataclass
class Replay:
    """What the journal knows beyond a checkpoint.

    Args:
        events: ("dispatched" | "again", tickets) or ("failed", uid), in the order in which they happened.
        finished: groups that have been generated, by uid.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    finished: dict[str, FinishedGroup] = field(default_factory=dict)


def _identity(checkpoint: Path | None) -> str | None:
    """What tells a checkpoint from all others, wherever it is moved to; None is the beginning of a run."""
    if checkpoint is None:
        return None
    path = checkpoint / STATE_FILE  # it has the random names of the groups that wait
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


class Journal:
    """The trainer's half of the journal.

    Args:
        root: folder of the journal; every node must see the same files there.
        fsync: wait until each record is on disk, see `RowsWriter`.
        settings: those of the run, see resume.py; each segment begins with them.
    """

    def __init__(self, root: str | Path, fsync: bool, settings: dict[str, Any]) -> None:
        self.root = Path(root).absolute()
        self.fsync = fsync
        self._settings = settings
        self._run: str | None = None
        self._segment = 0
        self._events: Any = None

    def position(self) -> dict[str, Any]:
        """Where the journal stands: the segment that is being written, and of which run."""
        return {"run": self._run, "segment": self._segment}

    def begins_after(self, checkpoint: Path | None) -> bool:
        """Whether the journal has all that happened since `checkpoint`, which was written without one.

        Args:
            checkpoint: None is the beginning of the run.
        """
        return min(self._segments(), default=0) == 1 and self._record().get("after") == _identity(checkpoint)

    def recorded_run(self) -> str | None:
        """The run whose journal is in `root`; None if there is none."""
        return self._record().get("run")

    def _record(self) -> dict[str, Any]:
        try:
            return json.loads((self.root / RUN_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def start(self, run: str | None, after: Path | None = None) -> None:
        """Go on with the journal of `run`, or begin one, in place of what is in `root`.

        Args:
            run: None begins a new one.
            after: the checkpoint after which a new one begins; None is the beginning of the run.
        """
        if run is None:
            self.root.mkdir(parents=True, exist_ok=True)
            if self._segments():
                logger.warning("a new journal is begun in %s; that of an earlier run is deleted", self.root)
            for path in (path for paths in self._segments().values() for path in paths):
                path.unlink()
            run = uuid.uuid4().hex
            write_durably(self.root / RUN_FILE, json.dumps({"run": run, "after": _identity(after)}))
        self._run = run
        self._segment = max(self._segments(), default=0)
        self.next_segment()

    def next_segment(self) -> None:
        """What is written from now on came after the checkpoint that is about to be written."""
        self._segment += 1
        if self._events is not None:
            self._events.close()
        self._events = (self.root / f"{self._segment:06d}.events.jsonl").open("ab", buffering=0)
        self._write(["settings", self._settings])

    def rows_path(self, worker: int) -> Path:
        """The file of an agent loop worker in the segment that is being written."""
        return self.root / f"{self._segment:06d}.worker-{worker}.rows"

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`. Finished groups are written by their agent loop workers."""
        match event:
            case events.Dispatched(tickets, again):
                self.dispatched(tickets, again)
            case events.Failed(ticket):
                self.failed(ticket.uid)

    def dispatched(self, tickets: Sequence[Ticket], again: bool = False) -> None:
        """These groups are about to be generated, for the first time or not."""
        self._write(["again" if again else "dispatched", [ticket.to_json() for ticket in tickets]])

    def failed(self, uid: str) -> None:
        """This group came to nothing."""
        self._write(["failed", uid])

    def _write(self, event: list[Any]) -> None:
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        try:
            if self._events.write(line) != len(line):
                raise OSError("written in part only")
            if self.fsync:
                os.fsync(self._events.fileno())
        except OSError as error:
            raise JournalError(f"the journal {self.root} cannot be written: {error}. Make room and resume") from error

    def _segments(self) -> dict[int, list[Path]]:
        segments: dict[int, list[Path]] = {}
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if match := _SEGMENT_FILE.match(path.name):
                segments.setdefault(int(match[1]), []).append(path)
        return segments

    def position_of(self, checkpoint: Path | None) -> dict[str, Any] | None:
        """Where in this journal `checkpoint` stands; None if nothing here came after it.

        Args:
            checkpoint: None is the beginning of the run.
        """
        run = self.recorded_run()
        if run is not None and self.begins_after(checkpoint):
            return {"run": run, "segment": 1}
        if checkpoint is None:
            return None
        path = checkpoint / RUN_FILE
        position = json.loads(path.read_text()) if path.exists() else None
        if position is not None and position["run"] != run:
            logger.warning("the journal %s is not that of the checkpoint %s: it is not used", self.root, checkpoint)
            return None
        return position

    def delete_unneeded(self, checkpoints: Checkpoints) -> None:
        """Delete what came before the oldest checkpoint.

        The segment before that checkpoint's may still hold groups that finished while it was being written.
        """
        positions = [self.position_of(checkpoints.folder(step)) for step in checkpoints.steps()]
        oldest = min((position["segment"] for position in positions if position is not None), default=0)
        for number, paths in self._segments().items():
            if number < oldest - 1:
                for path in paths:
                    path.unlink()

    def read(self, segment: int, version: int, in_flight: Iterable[str], must_agree: Iterable[str]) -> Replay:
        """What happened since a checkpoint.

        Groups of weights newer than the checkpoint's were generated by weights that are gone. Trained again on the
        same batches under the same settings they come again, so such groups are kept; those of a segment that was
        written under other settings are not.

        Args:
            segment: that of the checkpoint.
            version: weights of the checkpoint.
            in_flight: groups that were being generated when it was written.
            must_agree: settings without which nothing of the journal fits the run.

        Raises:
            JournalError: they differ.
        """
        replay, newest = Replay(), {}
        segments = {number: paths for number, paths in self._segments().items() if number >= segment - 1}
        for number, paths in segments.items():
            settings = self._read_events(paths, number >= segment, replay)
            self._require_agreement(settings, must_agree)
            newest[number] = None if settings == self._settings else version
        wanted = {*in_flight, *(ticket.uid for kind, what in replay.events if kind != "failed" for ticket in what)}
        for number, paths in segments.items():
            for path in paths:
                if path.suffix == ".rows":
                    self._read_rows(path, newest[number], wanted, replay)
        return replay

    def _require_agreement(self, settings: dict[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            if key in settings and settings[key] != self._settings[key]:
                raise JournalError(
                    f"{key}={self._settings[key]}: the journal {self.root} was written with {settings[key]!r}. Resume "
                    "with the old value, or set trainer.resume_mode=disable to begin anew"
                )

    @staticmethod
    def _read_events(paths: list[Path], is_wanted: bool, replay: Replay) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        for path in paths:
            for line in path.read_text(errors="replace").splitlines() if path.suffix == ".jsonl" else []:
                try:
                    kind, what = json.loads(line)
                except ValueError:
                    logger.warning("%s ends in a line that a crash cut off", path)
                    break
                if kind == "settings":
                    settings = what
                elif is_wanted:
                    replay.events.append(
                        (kind, what if kind == "failed" else [Ticket.from_json(each) for each in what])
                    )
        return settings

    @staticmethod
    def _read_rows(path: Path, newest_version: int | None, wanted: set[str], replay: Replay) -> None:
        for data in read_frames(path):
            if _about(data)["uid"] not in wanted:
                continue
            group = decode(data)
            if newest_version is None or group.newest_version <= newest_version:
                replay.finished[group.uid] = group
