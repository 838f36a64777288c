"""Can the run write where it wants to, and read what it wants to go on from?"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from verl_m2po.ground import logs
from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.settings import Text
from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import SAVE_FREQ, mode_and_settings
from verl_m2po.staleness.config import is_chosen
from verl_m2po.staleness.restart import resume
from verl_m2po.staleness.restart.checkpoint import POINTER

CHECKPOINTS = Text("trainer.default_local_dir", "the folder of the checkpoints")
RESUME_FROM = Text("trainer.resume_from_path", "the checkpoint folder to resume from, or null", may_be_null=True)
PROJECT = Text("trainer.project_name", "the name of the project")
NAME = Text("trainer.experiment_name", "the name of the run")

LONGEST_NAME_BYTES = 255 - len(".attempt-1000.jsonl")
"""File systems take 255 bytes; the log of an earlier attempt gets the longest name (`ground/logs.py`)."""


def log(config: DictConfig) -> Iterator[Problem]:
    """Yield what keeps verl's `file` logger from its file, and us from moving that of an earlier attempt."""
    project, name = PROJECT.of(config), NAME.of(config)
    path = logs.path_of(config)
    if path is None:
        return
    for key, part in ((PROJECT.key, project), (NAME.key, name)):
        length = max(len(piece.encode()) for piece in part.split("/"))
        if length > LONGEST_NAME_BYTES:
            why = f"it has {length} bytes, and no file of that name and its endings can be made"
            yield Problem(key, part, why, f"Shorten it to at most {LONGEST_NAME_BYTES}")
            return
    yield from _writable_file(NAME.key, name, path)


def ledger(config: DictConfig) -> Iterator[Problem]:
    """Yield a ledger of trained rows that cannot be written."""
    if not is_chosen(config):
        return
    mode, settings = mode_and_settings(config)
    if settings.ledger_path is not None:
        path = Path(settings.ledger_path).expanduser()
        yield from _writable_file(f"trainer.v1.{mode}.ledger_path", settings.ledger_path, path)


def journal(config: DictConfig) -> Iterator[Problem]:
    """Yield a folder of the journal in which nothing can be written."""
    if not is_chosen(config):
        return
    mode, settings = mode_and_settings(config)
    if settings.journal and settings.journal_path is not None:
        path = settings.journal_path
        yield from _writable_folder(f"trainer.v1.{mode}.journal_path", path, Path(path).expanduser())


def checkpoints(config: DictConfig) -> Iterator[Problem]:
    """Yield a folder of checkpoints in which nothing can be written although the run writes some."""
    folder = CHECKPOINTS.of(config)
    if SAVE_FREQ.of(config) <= 0:
        return
    if Path(folder).parts[:1] == ("~",):
        why = f"verl does not expand ~: checkpoints would go to {Path(folder).absolute()}"
        yield Problem(CHECKPOINTS.key, folder, why, f"Set it to {Path(folder).expanduser()}", is_fatal=False)
    yield from _writable_folder(CHECKPOINTS.key, folder, Path(folder))


def resumed(config: DictConfig) -> Iterator[Problem]:
    """Yield what keeps the run from going on from the checkpoint that it would resume from."""
    folder = CHECKPOINTS.of(config)
    path = RESUME_FROM.of(config)
    if path is not None and path.endswith("/") and read(config, "trainer.resume_mode") == "resume_path":
        why = "verl takes the trainer step from what follows `global_step_` in it, and a slash is no number"
        raise WrongValue(Problem(RESUME_FROM.key, path, why, f"Set it to {path.rstrip('/')}"))
    if (Path(folder) / POINTER).is_dir():
        why = f"its {POINTER} is a folder, and verl reads the step to resume from there"
        raise WrongValue(Problem(CHECKPOINTS.key, folder, why, "Remove that folder, or set another one"))
    yield from resume.problems(config)


def _writable_file(key: str, value: str, path: Path) -> Iterator[Problem]:
    if path.is_dir():
        yield Problem(key, value, f"{path} is a folder, and a file is to be written there", "Set it to another name")
        return
    try:
        if path.is_file():
            path.open("ab").close()
        else:
            _try_folder(path.parent)
    except OSError as error:
        yield _not_writable(key, value, path, error)


def _writable_folder(key: str, value: str, folder: Path) -> Iterator[Problem]:
    try:
        _try_folder(folder)
    except OSError as error:
        yield _not_writable(key, value, folder, error)


def _not_writable(key: str, value: str, path: Path, error: OSError) -> Problem:
    return Problem(
        key, value, f"{path} cannot be written ({error.strerror})", "Set it to a path that can, or make room"
    )


def _try_folder(folder: Path) -> None:
    """Raise OSError unless files can be made in `folder`, which need not be there yet; leaves nothing behind."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryFile(dir=existing):
        pass
