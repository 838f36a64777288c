"""Records of the journal: finished groups, packed, in frames that outlive being cut off.

A frame is a magic word, the length and the crc32 of what follows: safetensors, whose metadata holds a group's JSON. A
frame that a crash cut off, or that does not fit its checksum, is dropped, and its group is generated again.
"""

import json
import logging
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from verl_m2po.staleness.rule.records import Row

logger = logging.getLogger(__name__)

MAGIC = b"M2J1"
_FRAME = struct.Struct("<4sQI")


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


def about(data: bytes) -> dict[str, Any]:
    """The JSON of an encoded group, without its tensors."""
    header_bytes = int.from_bytes(data[:8], "little")
    return json.loads(json.loads(data[8 : 8 + header_bytes])["__metadata__"]["group"])


def decode(data: bytes) -> FinishedGroup:
    """What `encode` was given."""
    described = about(data)
    packed: list[dict[str, Any]] = [{"rest": from_json(rest)} for rest in described["rest"]]
    for name, joined in load(data).items():
        first = 0
        for row, shape in zip(packed, described["shapes"][name], strict=True):
            if shape is not None:
                size = int(np.prod(shape, dtype=np.int64))
                row[name] = joined[first : first + size].reshape(shape).clone()
                first += size
    return FinishedGroup(described["uid"], tuple(map(Row.from_json, described["rows"])), tuple(packed))


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
        size = os.fstat(file.fileno()).st_size
        while header := file.read(_FRAME.size):
            position = file.tell() - len(header)
            magic, length, crc = _FRAME.unpack(header) if len(header) == _FRAME.size else (b"", 0, 0)
            # A length that is not the writer's could be more than fits into memory.
            is_whole = magic == MAGIC and length <= size - file.tell()
            data = file.read(length) if is_whole else b""
            if not is_whole or len(data) < length:
                logger.warning("%s: what stands after byte %d is no whole record, and is dropped", path, position)
                return
            if zlib.crc32(data) == crc:
                yield data
            else:
                logger.warning("%s: the record at byte %d does not fit its checksum, and is dropped", path, position)
