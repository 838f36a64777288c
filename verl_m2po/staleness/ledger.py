"""A record of what was trained on: one JSON line per batch, enough to compare two runs row by row."""

import json
from pathlib import Path

from verl_m2po.staleness.records import Group


class TrainedRowsLedger:
    """Appends to a JSON-lines file; each line reaches the operating system before the batch is trained.

    One line: {"step": trainer step, "version": weight version that training starts from, "oldest_version": older tokens
    were masked (or null), "groups": [[prompt_index, uid, place, [[key, [[version, tokens], ...]], ...]], ...]}.
    A step that was trained, lost in a crash and trained again appears twice: the last line of a step counts.

    Args:
        path: the file; parents are created. An existing one is continued, as a resumed run does.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).expanduser()
        self._path.parent.mkdir(parents=True, exist_ok=True)

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
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
