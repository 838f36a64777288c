"""From a run's ledger to its trainer steps in time, for the timeline."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verl_m2po.ground import ledger


class LedgerError(ValueError):
    """The file is not a ledger from which a timeline can be drawn."""


@dataclass
class Step:
    """One trainer step; times in seconds since the epoch.

    Args:
        step: trainer step, from 1.
        version: weight version that training starts from.
        weights_at: since when the rollout has held it; after a restart, since then.
        sampled_at: when the first mini-batch was handed out.
        generated: (began, ended) of each group whose times are known.
        restored: weight version of each group that a journal or checkpoint kept over a restart: its times are lost.
        ended_at: when the next weights were there; None where that was not written: for the last step, and for one
            after which the run went down.
        down_since: the last sign of life of the run before, if a restart lies between this step and the one before.
    """

    step: int
    version: int
    weights_at: float
    sampled_at: float
    generated: list[tuple[float, float]] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    ended_at: float | None = None
    down_since: float | None = None


@dataclass
class History:
    """A run as its ledger has it.

    Args:
        steps: the trainer steps of the present weights, in order.
        weights: (since, version) of all weights that the rollout held, in order of time.
        torn: lines that could not be read.
        servers_lost_at: when rollout servers died under the run, that went on.
        servers_joined_at: when others took their places.
    """

    steps: list[Step]
    weights: list[tuple[float, int]]
    torn: int
    servers_lost_at: list[float] = field(default_factory=list)
    servers_joined_at: list[float] = field(default_factory=list)


def read_ledger(path: Path) -> History:
    """What the ledger at `path` says of when; steps that a restart threw away do not count, torn lines are skipped.

    Raises:
        LedgerError: it cannot be read, has no batch, or one without times, as before version 0.1.
    """
    # Opening anything else could wait for ever, as a FIFO does.
    if not path.is_file():
        raise LedgerError(f"{path} is no file: give the one that trainer.v1.<mode>.ledger_path names")
    try:
        lines = ledger.read(path)
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}") from error
    reader = _Reader()
    for number, line in enumerate(lines.whole, start=1):
        try:
            reader.take(line)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise LedgerError(f"entry {number} of {path} is not a ledger's: {reason}") from error
    if not reader.steps:
        torn = f"; line {lines.torn[0]} is no JSON" if lines.torn else ""
        raise LedgerError(f"{path} is empty: no batch has been trained yet{torn}")
    servers = (reader.servers_lost_at, reader.servers_joined_at)
    return History(list(reader.steps.values()), sorted(reader.weights), len(lines.torn), *servers)


class _Reader:
    """Takes the lines of a ledger one after the other."""

    def __init__(self) -> None:
        self.steps: dict[int, Step] = {}
        self.weights: set[tuple[float, int]] = set()
        self.servers_lost_at: list[float] = []
        self.servers_joined_at: list[float] = []
        self._last_sign: float | None = None
        self._down_since: float | None = None

    def take(self, line: dict[str, Any]) -> None:
        """One line more."""
        if "resumed_from" in line:
            self._restart(ledger.number("resumed_from", line["resumed_from"], is_whole=True))
        else:
            self._batch(line)

    def _restart(self, from_step: int) -> None:
        self.steps = {step: kept for step, kept in self.steps.items() if step <= from_step}
        self._down_since = self._last_sign

    def _batch(self, line: dict[str, Any]) -> None:
        times = [pair for pair in ledger.times(line) if pair is not None]
        sampled = _step(line)
        step = self.steps.get(sampled.step)
        if step is None:  # verl's separate modes sample a step's mini-batches one by one
            step = sampled
            if self._down_since is None and self.steps:
                next(reversed(self.steps.values())).ended_at = step.weights_at
            step.down_since, self._down_since = self._down_since, None
            self.steps[step.step] = step
        self.servers_lost_at += _moments(line, "servers_lost_at")
        self.servers_joined_at += _moments(line, "servers_joined_at")
        step.generated += times
        step.restored += _versions_without_times(line)
        self.weights.add((step.weights_at, step.version))
        self._last_sign = max([self._last_sign or 0.0, sampled.sampled_at, *(ended for _, ended in times)])


def _step(line: dict[str, Any]) -> Step:
    step, version = (ledger.number(name, line[name], is_whole=True) for name in ("step", "version"))
    weights_at, sampled_at = (ledger.number(name, line[name]) for name in ("weights_at", "sampled_at"))
    return Step(step, version, weights_at, sampled_at)


def _moments(line: dict[str, Any], name: str) -> list[float]:
    return [ledger.number(name, at) for at in line.get(name, [])]


def _versions_without_times(line: dict[str, Any]) -> list[int]:
    """The weight version that each group of the batch began with whose times are null."""
    groups = line.get("groups", [])
    lost = [group for group, times in zip(groups, line["generated"], strict=False) if times is None]
    versions = [[version for _, spans in rows for version, _ in spans] for _, _, _, rows in lost]
    return [min(ledger.number("version", version, is_whole=True) for version in of_group) for of_group in versions]
