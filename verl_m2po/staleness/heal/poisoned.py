"""Prompts that kill what generates them, on disk: no later start of the run tries one again."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl_m2po.ground.files import append
from verl_m2po.ground.verl_config import only_validates
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
        goes_on = config.trainer.resume_mode != "disable" or only_validates(config)
        return cls(Path(config.trainer.default_local_dir) / FILE, goes_on)

    def has(self, index: int | str) -> bool:
        """Whether the prompt was set aside."""
        return index in self._indices

    def on_event(self, event: events.Event) -> None:
        """See `rule.events.Listener`."""
        match event:
            case events.Failed(ticket, report) if report.deaths and ticket.prompt_index != UNKNOWN:
                self._indices.add(ticket.prompt_index)
                self._path.parent.mkdir(parents=True, exist_ok=True)
                append(self._path, json.dumps(ticket.prompt_index) + "\n")


def _read(path: Path) -> Iterator[int | str]:
    """Whole lines. One that a crash cut off is taken off the file: what is appended would make another name of it."""
    if not path.exists():
        return
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    for number, line in enumerate(data[:end].splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError:
            logger.warning("%s: line %d is no JSON, and is left out: %r", path, number, line)
