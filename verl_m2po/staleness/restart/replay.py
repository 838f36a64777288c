"""What the journal knows beyond a checkpoint, read back from its segments."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from verl_m2po.staleness.restart.frames import FinishedGroup, about, decode, read_frames
from verl_m2po.staleness.rule.records import Ticket

logger = logging.getLogger(__name__)

SINCE = "since"
"""Of a start, below the settings: the segment from which it has read what the run goes on from."""


def since(paths: Iterable[Path]) -> int | None:
    """What a start has written into the segment of `paths`; None if none did, or that of an older version."""
    for path in (path for path in paths if path.suffix == ".jsonl"):
        with path.open("rb") as file:
            for line in islice(file, 2):
                try:
                    kind, what = json.loads(line)
                except ValueError:  # cut off
                    return None
                if kind == SINCE:
                    return what
    return None


@dataclass
class Replay:
    """What the journal knows beyond a checkpoint.

    Args:
        events: ("dispatched" | "again", tickets) or ("failed", uid), in the order in which they happened.
        finished: groups that have been generated, by uid.
    """

    events: list[tuple[str, Any]] = field(default_factory=list)
    finished: dict[str, FinishedGroup] = field(default_factory=dict)

    def take_events(self, paths: Iterable[Path], is_wanted: bool) -> dict[str, Any]:
        """Read the events of one segment, and return the settings that it was written under.

        Args:
            paths: files of the segment.
            is_wanted: whether its events came after the checkpoint; otherwise only its settings are read.
        """
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
                elif is_wanted and kind != SINCE:
                    self.events.append((kind, what if kind == "failed" else [Ticket.from_json(each) for each in what]))
        return settings

    def dispatched_uids(self) -> set[str]:
        """Groups that the events have begun to generate."""
        return {ticket.uid for kind, what in self.events if kind != "failed" for ticket in what}

    def take_rows(self, paths: Iterable[Path], wanted: set[str], newest_version: int | None) -> None:
        """Read the finished groups of one segment; the last record of one counts.

        Args:
            paths: files of the segment.
            wanted: groups that the run waits for.
            newest_version: groups with a token of newer weights are left out; None leaves out none.
        """
        for path in (path for path in paths if path.suffix == ".rows"):
            for data in read_frames(path):
                if about(data)["uid"] not in wanted:
                    continue
                group = decode(data)
                if newest_version is None or group.newest_version <= newest_version:
                    self.finished[group.uid] = group
