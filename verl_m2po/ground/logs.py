"""Keeps the log of an earlier attempt: verl's `file` logger empties its file at every start, also of a resumed run.

The present attempt logs under the name that verl gives it; those before it are `<name>.attempt-1.jsonl`,
`<name>.attempt-2.jsonl`, ... beside it, and `verl-m2po report` joins them.
"""

import logging
import os
import re
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

logger = logging.getLogger(__name__)


def are_files(config: DictConfig) -> bool:
    """Whether verl's `file` logger is among those of the run."""
    loggers = OmegaConf.select(config, "trainer.logger")
    return loggers == "file" if loggers is None or isinstance(loggers, str) else "file" in loggers


def path_of(config: DictConfig) -> Path | None:
    """Where verl's `file` logger will write in this process; None if the run does not use it."""
    if not are_files(config):
        return None
    if path := os.environ.get("VERL_FILE_LOGGER_PATH"):
        return Path(path)
    root = Path(os.environ.get("VERL_FILE_LOGGER_ROOT", ".")).expanduser()
    return root / str(config.trainer.project_name) / f"{config.trainer.experiment_name}.jsonl"


def keep_earlier(path: Path | None) -> Path | None:
    """Move the log of an earlier attempt out of the way of the next; returns where it went, None if there was none."""
    if path is None or not path.is_file() or not path.stat().st_size:
        return None
    name = re.compile(rf"{re.escape(path.stem)}\.attempt-(\d+){re.escape(path.suffix)}")
    # Above all that are there, never in a gap: the report joins attempts in the order of their numbers.
    numbers = [int(match[1]) for other in path.parent.iterdir() if (match := name.fullmatch(other.name))]
    aside = path.with_name(f"{path.stem}.attempt-{max(numbers, default=0) + 1}{path.suffix}")
    os.rename(path, aside)
    logger.info("the log of the attempt before this one is now %s", aside)
    return aside


def follow_verl() -> None:
    """Send this package's messages where verl's go, in the process in which verl has set that up.

    Libraries raise the level of the root logger there; verl keeps its own logger from that, and of ours the warnings
    would be lost.
    """
    verls, ours = logging.getLogger("verl"), logging.getLogger("verl_m2po")
    if verls.handlers:
        ours.handlers, ours.propagate = list(verls.handlers), verls.propagate
        ours.setLevel(verls.level)
