"""Read one log of one attempt: a JSON lines file of verl's `file` logger, or one TensorBoard event file.

Nothing from a log is ever executed: values become floats, everything else is counted and left out.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

# A step is an index into a float64 axis: beyond this, neighbouring steps would be drawn as one.
LARGEST_STEP = 2**53


@dataclass
class Log:
    """What one file holds.

    Args:
        path: The file.
        rows: Step (trainer steps) to metric to value; a value that was logged as NaN is NaN here.
        problems: One line for each thing that could not be read.
    """

    path: Path
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """Float columns by metric, sorted by step; NaN where a metric was not logged."""
        frame = pd.DataFrame.from_dict(self.rows, orient="index", dtype=float).sort_index()
        frame.index = frame.index.astype("int64")
        return frame


def _number(value: object) -> float | None:
    """A float; NaN for null, which is how verl's logger writes NaN and infinities; None for what is not a number."""
    if value is None:
        return math.nan
    if not isinstance(value, bool | int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(line: str) -> tuple[int, dict] | None:
    """The (step, data) of one line of verl's `file` logger, or None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("data"), dict):
        return None
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < LARGEST_STEP:
        return None
    return step, record["data"]


def is_json_log(path: Path) -> bool:
    """Whether the file is verl's `file` log, and not, say, a dump of generations; an empty or cut file passes."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first, second = lines.readline(), lines.readline()
    if _parse(first) is not None or _parse(second) is not None:
        return True
    return not second and not _is_json(first)


def is_ledger(path: Path) -> bool:
    """Whether the file is a ledger of trained rows (`ground.ledger`), which lies beside a log and is none."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        try:
            first = json.loads(lines.readline())
        except (ValueError, RecursionError):
            return False
    return isinstance(first, dict) and ("resumed_from" in first or {"step", "version", "groups"} <= first.keys())


def read_json_lines(path: Path) -> Log:
    """Read a log of verl's `file` logger (verl/utils/tracking.py `FileLogger`): one {"step", "data"} object a line.

    Lines that are not that, such as the last line of a run that died while writing, are counted, not raised.
    """
    log = Log(path)
    cut: list[int] = []
    again: list[int] = []
    not_numbers: set[str] = set()
    line_number = latest = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line_number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            parsed = _parse(line)
            if parsed is None:
                cut.append(line_number)
                continue
            step, data = parsed
            if step < latest or data.keys() & log.rows.get(step, {}).keys():
                again.append(line_number)
            latest = max(step, latest)
            row = log.rows.setdefault(step, {})
            for name, value in data.items():
                number = _number(value)
                if number is None:
                    not_numbers.add(name)
                else:
                    row[name] = number
    log.problems += _cut_lines(path, cut, line_number)
    if again:
        log.problems.append(
            f"{path}: {len(again)} line(s) log a step that was logged before, first line {again[0]}: two runs wrote to "
            "it, or one began again; of each step the last line counts"
        )
    if not log.rows and not cut:
        log.problems.append(f"{path}: empty, no step was logged")
    if not_numbers:
        log.problems.append(f"{path}: left out {len(not_numbers)} metric(s) that are not numbers: {_some(not_numbers)}")
    return log


def _cut_lines(path: Path, cut: list[int], last: int) -> list[str]:
    if not cut:
        return []
    if cut == [last]:
        return [f"{path}: the last line ({last}) is cut; the run died while writing it, or is writing it now"]
    return [f'{path}: {len(cut)} line(s) are not {{"step", "data"}} objects and were left out, first line {cut[0]}']


def _some(names: set[str], most: int = 5) -> str:
    shown = sorted(names)[:most]
    return ", ".join(shown) + (", ..." if len(names) > most else "")


def read_event_file(path: Path) -> Log:
    """Read one TensorBoard event file, as verl's `tensorboard` logger writes it.

    Raises:
        OSError: the file cannot be opened.
        ModuleNotFoundError: tensorboard is not installed; the message says how to get it.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a TensorBoard log; reading it needs tensorboard: pip install tensorboard"
        ) from error
    # Raises an OSError, where tensorboard would raise errors of its own.
    path.open("rb").close()
    log = Log(path)
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            if 0 <= event.step < LARGEST_STEP:
                log.rows.setdefault(int(event.step), {})[name] = float(event.value)
    # tensorboard stops at the first record that it cannot read, and says nothing.
    if (whole := _whole_bytes(path)) is not None:
        log.problems.append(
            f"{path}: damaged or cut after byte {whole}; the run died while writing it, or is writing it now"
        )
    elif not log.rows:
        log.problems.append(f"{path}: empty, no step was logged")
    return log


def _whole_bytes(path: Path) -> int | None:
    """Where the first record of an event file begins that does not end in the file; None where all do.

    A record is its length (8 bytes, little-endian), a checksum (4), the data and another checksum (4).
    """
    size = path.stat().st_size
    place = 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            end = place + 16 + int.from_bytes(file.read(8), "little")
            if end > size:
                return place
            place = end
    return None
