"""A record of what was trained on: one JSON line per batch, enough to compare two runs row by row."""

import json
import time
from pathlib import Path

from verl_m2po.staleness.records import Group, GroupReport


class TrainedRowsLedger:
    """Appends to a JSON-lines file; each line reaches the operating system before the batch is trained.

    One line: {"step": trainer step, "version": weight version that training starts from, "oldest_version": older tokens
    were masked (or null), "groups": [[prompt_index, uid, place, [[key, [[version, tokens], ...]], ...]], ...], and in
    seconds since the epoch, for the timeline, "weights_at": the rollout has held `version` since, "sampled_at": the
    batch was handed out, "generated": [[began, ended] of each group, or null if that was before a restart]}.
    A step that was trained, lost in a crash and trained again appears twice: the last line of a step counts.

    Args:
        path: the file; parents are created. An existing one is continued, as a resumed run does.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._generated: dict[str, tuple[float, float]] = {}
        self._weights_at = time.time()

    def advanced(self) -> None:
        """The rollout holds new weights from now on."""
        self._weights_at = time.time()

    def finished(self, report: GroupReport) -> None:
        """A group came to its end; it is written when it is trained."""
        self._generated[report.uid] = (report.began_at, report.finished_at)

    def evicted(self, groups: tuple[Group, ...]) -> None:
        """These finished groups will never be trained."""
        for group in groups:
            self._generated.pop(group.ticket.uid, None)

    def trained(self, step: int, version: int, oldest_version: int | None, groups: tuple[Group, ...]) -> None:
        line = {
            "step": step,
            "version": version,
            "oldest_version": oldest_version,
            "groups": [
                [
                    group.ticket.prompt_index,
                    group.ticket.uid,
                    group.ticket.place,
                    [[row.key, [list(span) for span in row.spans]] for row in group.rows],
                ]
                for group in groups
            ],
            "weights_at": round(self._weights_at, 3),
            "sampled_at": round(time.time(), 3),
            "generated": [self._times(group) for group in groups],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")

    def _times(self, group: Group) -> list[float] | None:
        times = self._generated.pop(group.ticket.uid, None)
        return times and [round(moment, 3) for moment in times]
