"""Prompts that kill what generates them, on disk: no later start of the run tries one again."""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig

from verl_m2po.staleness.rule import events

logger = logging.getLogger(__name__)

FILE = "poisoned.jsonl"
"""In `trainer.default_local_dir`."""

UNKNOWN = -1
"""The index of a prompt whose data set has none."""


class PoisonedPrompts:
    """Those that were set aside, by their position or name in the data set.

    Args:
        path: keeps them, one JSON value a line; written with the first one.
        goes_on: with what an earlier start has written; otherwise that is deleted.
    """

    def __init__(self, path: Path, goes_on: bool = True) -> None:
        self._path = path
        if not goes_on:
            path.unlink(missing_ok=True)
        self._indices = set(_read(path))
        if self._indices:
            logger.warning("%d prompts stay set aside as poisoned: %s", len(self._indices), path)

    @classmethod
    def of(cls, config: DictConfig) -> "PoisonedPrompts":
        """Beside the checkpoints of a run with `config`, which goes on with them or begins anew."""
        return cls(Path(config.trainer.default_local_dir) / FILE, config.trainer.resume_mode != "disable")

    def has(self, index: int | str) -> bool:
        """Whether the prompt was set aside."""
        return index in self._indices

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`."""
        match event:
            case events.Failed(ticket, report) if report.deaths and ticket.prompt_index != UNKNOWN:
                self._indices.add(ticket.prompt_index)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a") as file:
                    file.write(json.dumps(ticket.prompt_index) + "\n")


def _read(path: Path) -> list[int | str]:
    """Whole lines; one that a crash cut off has no end and is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
