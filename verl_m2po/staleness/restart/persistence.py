"""What outlives the trainer's process: its checkpoints, its journal, and the way back from both."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import only_validates
from verl_m2po.staleness.config import load_mode_config
from verl_m2po.staleness.restart import random_states, resume, verl_half
from verl_m2po.staleness.restart.backlog import Backlog, Draw
from verl_m2po.staleness.restart.checkpoint import Checkpoints, folder_name
from verl_m2po.staleness.restart.journal import RUN_FILE, Journal
from verl_m2po.staleness.rule.rules import StalenessRule

logger = logging.getLogger(__name__)


class Buffer(Protocol):
    """What is asked of the replay buffer."""

    rule: StalenessRule
    backlog: Backlog

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], version: int) -> None: ...

    def begin(self, version: int) -> None: ...


class Persistence:
    """Saves a run, and brings it back.

    Args:
        checkpoints: where they are.
        settings: those of the run that a checkpoint depends on, see `resume.settings_of`.
        journal: what was dispatched since the last checkpoint; None for none.
        resumed_from: the checkpoint that the run goes on from; None starts from scratch.
        state: the state in that checkpoint.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        settings: dict[str, Any],
        journal: Journal | None = None,
        resumed_from: Path | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.journal = journal
        self.saved_step = 0
        self.state: dict[str, Any] = {} if state is None else state
        self.resumed_from = resumed_from
        self._checkpoints, self._settings = checkpoints, settings
        self._journal_to: Callable[[Journal], None] | None = None

    @classmethod
    def open(cls, config: DictConfig) -> "Persistence":
        """That of a run with verl's configuration `config`, before verl or the mode have changed it.

        Raises:
            CheckpointError: what it would resume from is not whole, or no checkpoint can be written.
            FileNotFoundError: another trainer mode wrote what it would resume from.
        """
        settings = resume.settings_of(config)
        checkpoints = Checkpoints(config.trainer.default_local_dir)
        resumed_from = resume.find(config.trainer)
        state = resume.read_state(resumed_from) if resumed_from is not None else None
        if resumed_from is not None and config.trainer.resume_mode == "resume_path":
            # verl takes the step from what follows the last "global_step_", a trailing slash included.
            config.trainer.resume_from_path = str(resumed_from)
        if config.trainer.save_freq > 0:
            checkpoints.require_writable()
        mode = load_mode_config(config, config.trainer.v1.trainer_mode)
        journal = None
        if mode.journal and not only_validates(config):
            root = checkpoints.root / "journal" if mode.journal_path is None else mode.journal_path
            journal = Journal(root, mode.journal_fsync, settings)
        return cls(checkpoints, settings, journal, resumed_from, state)

    def problems(self, ranks: int) -> list[Problem]:
        """What keeps a run of that many actor ranks from going on from the checkpoint."""
        if self.resumed_from is None:
            return []
        return resume.check(self.resumed_from, self.state, self._settings, ranks)

    def journal_with(self, journal_to: Callable[[Journal], None]) -> None:
        """Let the agent loop workers write to the journal from now on.

        Args:
            journal_to: points them to its present segment.
        """
        self._journal_to = journal_to
        if self.journal is not None:
            journal_to(self.journal)

    def save(self, trainer: verl_half.Host, state: dict[str, Any], verls_half: Callable[[], None]) -> None:
        """Write the checkpoint of the trainer's present step, whole or not at all.

        Args:
            trainer: verl's.
            state: of the buffer and of the trainer, as plain JSON.
            verls_half: verl's `_save_checkpoint`.

        Raises:
            CheckpointError: it could not be written; the earlier ones are as they were.
        """
        step = trainer.global_steps
        name = folder_name(step)
        state = {**state, "settings": self._settings, "random_states": random_states.save()}
        text = json.dumps(state, separators=(",", ":"))
        if self.journal is not None:
            self.journal.next_segment()
            if self._journal_to is not None:
                self._journal_to(self.journal)
        with self._checkpoints.writing(step, self.resumed_from) as incomplete:
            (incomplete / name / resume.STATE_FILE).write_text(text)
            if self.journal is not None:
                (incomplete / name / RUN_FILE).write_text(json.dumps(self.journal.position()))
            with verl_half.written_into(trainer, incomplete):
                verls_half()
            resume.require_all_shards(incomplete / name)
        self._checkpoints.prune(step, verl_half.checkpoints_to_keep(trainer))
        if self.journal is not None:
            self.journal.delete_unneeded(self._checkpoints)
        verl_half.callback_of(trainer).on_save(
            trainer=trainer,
            global_step=step,
            checkpoint_dir=str(self._checkpoints.folder(step)),
            async_save=False,
        )
        self.saved_step = step

    def restore(self, buffer: Buffer, config: DictConfig, step: int, draw: Draw) -> None:
        """Bring `buffer` to where the run goes on, after verl has loaded its half.

        Args:
            config: verl's configuration.
            step: trainer step of the checkpoint, 0 without one.
            draw: the next prompts of the data set.
        """
        if self.resumed_from is not None:
            buffer.load_state_dict(self.state, version=step)
            if "random_states" in self.state:  # format 1 has none
                random_states.load(self.state["random_states"])
            self.saved_step = step
        self.state = {}
        if self.journal is not None:
            self._replay(self.journal, buffer, config, step, draw)
        buffer.begin(step)

    def _replay(self, journal: Journal, buffer: Buffer, config: DictConfig, step: int, draw: Draw) -> None:
        """Take back what was generated since the checkpoint, or since the beginning where there is none."""
        position = journal.position_of(self.resumed_from)
        if config.trainer.resume_mode == "disable":
            position = None
        if position is not None:
            must_agree = resume.refused_keys(config.trainer.v1.trainer_mode)
            if self.resumed_from is None:
                must_agree = [*must_agree, resume.MODEL]
            in_flight = [ticket.uid for ticket in buffer.rule.in_flight_tickets()]
            buffer.backlog.replay(journal.read(position["segment"], step, in_flight, must_agree), draw)
        if position is None:
            journal.start(None, after=self.resumed_from)
        else:
            journal.start(position["run"], read_from=position["segment"])
