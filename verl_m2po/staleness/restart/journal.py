"""A journal on disk: what was dispatched and generated since the last checkpoint outlives a crash.

    <journal_path>/journal.json             which run the journal belongs to, and the checkpoint after which it begins
    <journal_path>/000007.events.jsonl      trainer: groups dispatched, dispatched again, failed; one JSON list a line
    <journal_path>/000007.worker-2.rows     agent loop worker 2: finished groups, packed, in frames

Every start and every checkpoint begins a new segment, with the next number. A checkpoint names its segment: what stands
in that one and in all later ones came after it, but for those of runs that went on from an earlier checkpoint: a start
writes down from which segment. Segments that no checkpoint needs are deleted.
"""

import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from verl_m2po.ground.files import write_durably
from verl_m2po.staleness.restart.checkpoint import Checkpoints
from verl_m2po.staleness.restart.frames import JournalError
from verl_m2po.staleness.restart.replay import SINCE, Replay, since
from verl_m2po.staleness.restart.resume import STATE_FILE
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.records import Ticket

logger = logging.getLogger(__name__)

_SEGMENT_FILE = re.compile(r"^(\d{6,})\.(?:events\.jsonl|worker-\d+\.rows)$")

RUN_FILE = "journal.json"
"""Also the name of the file in a checkpoint that says where in the journal it stands."""


def _identity(checkpoint: Path | None) -> str | None:
    """What tells a checkpoint from all others, wherever it is moved to; None is the beginning of a run."""
    if checkpoint is None:
        return None
    path = checkpoint / STATE_FILE  # it has the random names of the groups that wait
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


class Journal:
    """The trainer's half of the journal.

    Args:
        root: folder of the journal, `~` is the home; every node must see the same files there.
        fsync: wait until each record is on disk, see `RowsWriter`.
        settings: those of the run, see resume.py; each segment begins with them.
    """

    def __init__(self, root: str | Path, fsync: bool, settings: dict[str, Any]) -> None:
        self.root = Path(root).expanduser().absolute()
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

    def start(self, run: str | None, after: Path | None = None, read_from: int | None = None) -> None:
        """Go on with the journal of `run`, or begin one, in place of what is in `root`.

        Args:
            run: None begins a new one.
            after: the checkpoint after which a new one begins; None is the beginning of the run.
            read_from: the segment from which the run has read what it goes on from; None where it begins.
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
        if read_from is not None:
            self._write([SINCE, read_from])

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
            case events.Failed(ticket) | events.SetAside(ticket):
                self.failed(ticket.uid)

    def dispatched(self, tickets: Sequence[Ticket], again: bool = False) -> None:
        """These groups are about to be generated, for the first time or not."""
        self._write(["again" if again else "dispatched", [ticket.to_json() for ticket in tickets]])

    def failed(self, uid: str) -> None:
        """This group came to nothing, or to nothing that is trained; its place is free again."""
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
        segments = self._after(segment)
        for number, paths in segments.items():
            settings = replay.take_events(paths, is_wanted=number >= segment)
            self._require_agreement(settings, must_agree)
            newest[number] = None if settings == self._settings else version
        wanted = {*in_flight, *replay.dispatched_uids()}
        for number, paths in segments.items():
            replay.take_rows(paths, wanted, newest[number])
        return replay

    def _after(self, segment: int) -> dict[int, list[Path]]:
        """The segment before `segment`, itself, and what was written later by runs that went on from one of these.

        A run that was rewound to an earlier checkpoint writes into the same journal: to what came after a later
        checkpoint it does not belong, since it has dispatched other groups in the same places.
        """
        segments = self._segments()
        found = {number: segments[number] for number in (segment - 1, segment) if number in segments}
        belongs = True
        for number, paths in sorted(segments.items()):
            if number > segment:
                read_from = since(paths)
                belongs = belongs if read_from is None else read_from >= segment and read_from in found
                if belongs:
                    found[number] = paths
        return found

    def _require_agreement(self, settings: dict[str, Any], keys: Iterable[str]) -> None:
        for key in keys:
            if key in settings and settings[key] != self._settings[key]:
                raise JournalError(
                    f"{key}={self._settings[key]}: the journal {self.root} was written with {settings[key]!r}. Resume "
                    "with the old value, or set trainer.resume_mode=disable to begin anew"
                )
