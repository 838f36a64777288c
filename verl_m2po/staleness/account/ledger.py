"""A record of what was trained on: one JSON line per batch, enough to compare two runs row by row."""

import json
import os
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_m2po.ground import ledger
from verl_m2po.ground.files import append
from verl_m2po.ground.ledger import surviving
from verl_m2po.ground.verl_config import only_validates
from verl_m2po.staleness.config import load_mode_config
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.records import Group, GroupReport
from verl_m2po.staleness.rule.units import UpdateCount

__all__ = ["TrainedRowsLedger", "read_ledger", "surviving"]


class TrainedRowsLedger:
    """Appends to a JSON-lines file; each line reaches the operating system before the batch is trained.

    One line per batch: {"step": trainer step, "version": weight version that training starts from, "oldest_version":
    older tokens were masked (or null), "groups": [[prompt_index, uid, place, [[key, [[version, tokens], ...]], ...]],
    ...], "updates_before": optimizer updates of the whole run before this batch, and in seconds since the epoch, for
    the timeline, "weights_at": the rollout has held `version` since, "sampled_at": the batch was handed out,
    "generated": [[began, ended] of each group, or null if that was before a restart]}; with dynamic sampling also
    "set_aside": [[prompt_index, uid, place, value that all its trajectories share], ...], the groups without advantage
    since the line before; where rollout servers died or replaced others in the trainer step before, "servers_lost_at"
    and "servers_joined_at": when. One line per start: {"resumed_from": trainer step of the checkpoint, 0 without one}.
    Steps after it that stand above that line were trained with weights that are gone; `surviving` drops them. A masked
    trajectory has the weight versions of the one that it copies, with 0 tokens each.

    Args:
        path: the file; parents are created. An existing one is continued, as a resumed run does.
        updates: counts the optimizer updates of the run; None writes no count of them.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: str, updates: UpdateCount | None = None) -> None:
        self._updates = updates
        self._path = Path(path).expanduser()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError as error:
            raise OSError(
                f"ledger_path={path}: the ledger cannot be written ({error.strerror}). Set it to a file in a "
                "folder that can be written, or to null"
            ) from error
        _end_torn_line(self._path)
        self._set_aside: list[list[Any]] = []
        self._servers: dict[str, list[float]] = {}
        self._generated: dict[str, tuple[float, float]] = {}
        self._weights_at = time.time()

    @classmethod
    def of(cls, config: DictConfig, updates: UpdateCount | None = None) -> "TrainedRowsLedger | None":
        """That of a run with verl's `config`; None where none is asked for, or nothing is trained.

        Raises:
            OSError: it cannot be written.
        """
        path = load_mode_config(config, config.trainer.v1.trainer_mode).ledger_path
        # A start that trains nothing has thrown away no step, from whichever checkpoint it went on.
        return None if path is None or only_validates(config) else cls(path, updates)

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`."""
        match event:
            case events.Resumed(version):
                self.resumed(version)
            case events.Advanced():
                self.advanced()
            case events.Finished(_, report):
                self.finished(report)
            case events.SetAside(ticket, report):
                self._set_aside.append([ticket.prompt_index, ticket.uid, ticket.place, report.shared_metric])
            case events.ServersChanged(lost_at, joined_at):
                self.servers_changed(lost_at, joined_at)
            case events.Evicted(groups):
                self.evicted(groups)
            case events.Trained(step, version, selection):
                self.trained(step, version, selection.oldest_version, selection.groups)
                self.evicted((*selection.used_up, *selection.retired))

    def advanced(self) -> None:
        """The rollout holds new weights from now on."""
        self._weights_at = time.time()

    def servers_changed(self, lost_at: tuple[float, ...], joined_at: tuple[float, ...]) -> None:
        """Rollout servers died and joined at these moments; they are written with the next batch."""
        for name, moments in (("servers_lost_at", lost_at), ("servers_joined_at", joined_at)):
            if moments:
                self._servers.setdefault(name, []).extend(round(moment, 3) for moment in moments)

    def finished(self, report: GroupReport) -> None:
        """A group came to its end; it is written when it is trained."""
        self._generated[report.uid] = (report.began_at, report.finished_at)

    def evicted(self, groups: tuple[Group, ...]) -> None:
        """These finished groups will never be trained, or not again."""
        for group in groups:
            self._generated.pop(group.ticket.uid, None)

    def trained(self, step: int, version: int, oldest_version: int | None, groups: tuple[Group, ...]) -> None:
        """These groups are trained in trainer step `step`, from weight `version`; their line is written now.

        Args:
            step: verl's global step, from 1.
            version: weight version that the step starts from.
            oldest_version: tokens of older versions are masked; None masks none.
            groups: the batch, in the order in which it is trained.
        """
        self._append(
            {
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
                **self._updates_made(step, version),
                "weights_at": round(self._weights_at, 3),
                "sampled_at": round(time.time(), 3),
                "generated": [self._times(group) for group in groups],
                **({"set_aside": self._set_aside} if self._set_aside else {}),
                **self._servers,
            }
        )
        self._set_aside, self._servers = [], {}

    def _updates_made(self, step: int, version: int) -> dict[str, int]:
        if self._updates is None:
            return {}
        return {"updates_before": self._updates.between(0, version) + self._updates.in_step(step)}

    def _times(self, group: Group) -> list[float] | None:
        times = self._generated.get(group.ticket.uid)
        return times and [round(moment, 3) for moment in times]

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint after trainer step `step`; 0 starts from scratch."""
        self._append({"resumed_from": step})

    def _append(self, line: dict[str, Any]) -> None:
        append(self._path, json.dumps(line, separators=(",", ":")) + "\n")


def _end_torn_line(path: Path) -> None:
    """What a crash cut off in the middle of a line must not swallow the next one."""
    if not path.stat().st_size:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def read_ledger(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a ledger, in order; lines that a crash cut off are left out."""
    return ledger.read(path).whole
