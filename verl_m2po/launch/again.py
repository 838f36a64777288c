"""A run that cannot go on goes on by itself: the command starts again from the last checkpoint and the journal.

In the same process, which becomes the command once more, so that terminal, exit status and what a batch system watches
stay the same. Nothing of the failed attempt is left in it.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from verl_m2po.ground.verl_config import TRAINER_MODE, read
from verl_m2po.staleness.config import is_chosen, load_mode_config
from verl_m2po.staleness.restart.checkpoint import POINTER
from verl_m2po.staleness.watch import stop

VARIABLE = "VERL_M2PO_FAILED_AT_STEPS"
"""Of the environment: the trainer steps at which the attempts of this command failed, as a JSON list."""

AT_THE_SAME_STEP = 2
"""Restarts that may be tried at one trainer step: what fails there a third time is no accident."""


@dataclass(frozen=True)
class Attempts:
    """What has become of the attempts before this one.

    Args:
        failed_at: the trainer step that each of them had come to, in their order.
    """

    failed_at: tuple[int, ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> "Attempts":
        """Those of this command."""
        return cls(tuple(json.loads(environment.get(VARIABLE, "[]"))))

    def why_not(self, allowed: int, step: int) -> str | None:
        """Why a run that failed at trainer step `step` does not start again; None if it does.

        Args:
            allowed: `restarts` of the mode.
        """
        if len(self.failed_at) >= allowed:
            return f"it has been restarted {len(self.failed_at)} times, which is all that restarts={allowed} allows"
        if self.failed_at[-AT_THE_SAME_STEP:] == (step,) * AT_THE_SAME_STEP:
            return f"it has been restarted {AT_THE_SAME_STEP} times at trainer step {step}, and failed there again"
        return None

    def after(self, step: int) -> "Attempts":
        """With this one, which failed at trainer step `step`."""
        return Attempts((*self.failed_at, step))


def allowed(config: DictConfig) -> int:
    """How often a run with `config` may start again by itself; 0 for one without a mode of this package."""
    return load_mode_config(config, read(config, TRAINER_MODE)).restarts if is_chosen(config) else 0


def failed_step(config: DictConfig) -> int:
    """The trainer step that the run had come to. Before Ray is closed.

    Where Ray no longer answers, that of the last checkpoint: what is known for certain.
    """
    try:
        step = stop.get(stop.STEP)
        return 0 if step is None else step
    except Exception:  # of a store whose process is gone, in whatever words Ray has for that
        pointer = Path(str(read(config, "trainer.default_local_dir"))) / POINTER
        return int(pointer.read_text()) if pointer.is_file() else 0


def start_again(config: DictConfig, attempts: Attempts) -> NoReturn:
    """Become the command of this process once more. After Ray is closed.

    Args:
        config: the composed config, with Hydra's section.
        attempts: all that failed, this one included.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(str(read(config, "hydra.runtime.cwd", os.getcwd())))
    os.environ[VARIABLE] = json.dumps(attempts.failed_at)
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
