"""Is the model of a run there, and do prompt and response fit into it?"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem, WrongValue
from verl_m2po.ground.settings import Number, Text
from verl_m2po.staleness.checks.numbers import PROMPT_LENGTH, RESPONSE_LENGTH

PATH = Text("actor_rollout_ref.model.path", "the folder of a model, or a hub id", may_be_null=True)
OVERRIDES = "actor_rollout_ref.model.override_config"
POSITIONS = "max_position_embeddings"


def is_remote(path: str) -> bool:
    """Whether `path` names a file system that verl copies from."""
    return "://" in path


def exists(config: DictConfig) -> Iterator[Problem]:
    """Yield a model that is neither a folder, nor in the cache, nor to be had."""
    path = PATH.of(config)
    if path is None or is_remote(path):
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield Problem(PATH.key, path, "the folder has no config.json, so it is not a model", "Name another folder")
        return
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local:
        yield Problem(
            PATH.key,
            path,
            "there is no such folder",
            "Name a folder with a model or a hub id; `python -m verl_m2po.tasks tiny-model` builds a tiny model and "
            "prints its path",
        )
    elif _offline() and not _is_cached(path):
        yield Problem(
            PATH.key,
            path,
            "the model is not in the local cache, and HF_HUB_OFFLINE forbids fetching it",
            "Unset HF_HUB_OFFLINE, or download the model and name its folder",
        )


def positions(config: DictConfig) -> Iterator[Problem]:
    """Prompt and response must fit into the model, which vLLM would find only after everything has started."""
    if not own_config(config):
        return
    most, where = _positions_of(config)
    length = PROMPT_LENGTH.of(config) + RESPONSE_LENGTH.of(config)
    if most is not None and length > most:
        yield Problem(
            f"{PROMPT_LENGTH.key} + {RESPONSE_LENGTH.key}",
            length,
            f"the model has {most} positions ({POSITIONS} in {where})",
            "Shorten one of them, or choose another model",
        )


def own_config(config: DictConfig) -> Mapping[str, Any] | None:
    """The model's own config.json; None where the model is not in a folder of this machine.

    Raises:
        WrongValue: it cannot be read, or is no mapping.
    """
    path = PATH.of(config)
    file = Path(path or "").expanduser() / "config.json"
    if path is None or is_remote(path) or not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
    except ValueError as error:  # UnicodeDecodeError among them
        raise _unreadable(path, f"its config.json cannot be read ({error})") from error
    if not isinstance(found, dict):
        raise _unreadable(path, f"its config.json holds a {type(found).__name__}, not a mapping")
    return found


def _unreadable(path: str, why: str) -> WrongValue:
    return WrongValue(Problem(PATH.key, path, why, "Copy the model again, or name another"))


def _positions_of(config: DictConfig) -> tuple[int | None, str]:
    """Positions of the model and where that stands: verl lets the config override the model's own file."""
    for section in (f"{OVERRIDES}.model_config", OVERRIDES):
        number = Number(f"{section}.{POSITIONS}", 1, may_be_null=True, meaning="positions of the model")
        if (overridden := number.of(config)) is not None:
            return overridden, section
    path = PATH.of(config)
    found = (own_config(config) or {}).get(POSITIONS)
    if Number(POSITIONS, 1, may_be_null=True).problem_of(found) is not None:
        raise _unreadable(path, f"its config.json has {POSITIONS}={found!r}, which is no number of positions")
    return found, str(Path(path).expanduser() / "config.json")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def _is_cached(model_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model_id, "config.json"), str)
    except HFValidationError as error:
        why = f"it is no folder and no hub id ({str(error).splitlines()[0]})"
        raise WrongValue(Problem(PATH.key, model_id, why, "Name a folder with a model or a hub id")) from error
