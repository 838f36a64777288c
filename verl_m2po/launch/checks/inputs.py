"""Are the model and the data of a run there, and are they what verl needs?"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from verl_m2po.ground.problem import Problem

MODEL = "actor_rollout_ref.model.path"
OVERRIDES = "actor_rollout_ref.model.override_config"
# What verl's dataset and its reward loop read.
COLUMNS = ("prompt", "data_source", "reward_model")


def problems(config: DictConfig) -> Iterator[Problem]:
    """Yield what is wrong with the model and the data of `config`."""
    yield from _model(OmegaConf.select(config, MODEL))
    yield from _positions(config)
    for key in ("data.train_files", "data.val_files"):
        # A file may stand several times, to weigh more.
        for file in dict.fromkeys(_as_list(OmegaConf.select(config, key))):
            yield from _data(key, file)


def _as_list(files: object) -> list[str]:
    if files is None:
        return []
    return [str(file) for file in files] if isinstance(files, ListConfig | list) else [str(files)]


def _is_remote(path: str) -> bool:
    return "://" in path


def _model(path: str | None) -> Iterator[Problem]:
    if path is None or _is_remote(path):
        return
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            yield Problem(MODEL, path, "the folder has no config.json, so it is not a model", "Name another folder")
        return
    looks_local = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if looks_local:
        yield Problem(
            MODEL,
            path,
            "there is no such folder",
            "Name a folder with a model or a hub id; `python -m verl_m2po.tasks tiny-model` builds a tiny model and "
            "prints its path",
        )
    elif _offline() and not _is_cached(path):
        yield Problem(
            MODEL,
            path,
            "the model is not in the local cache, and HF_HUB_OFFLINE forbids fetching it",
            "Unset HF_HUB_OFFLINE, or download the model and name its folder",
        )


def _positions(config: DictConfig) -> Iterator[Problem]:
    """Prompt and response must fit into the model, which vLLM would find only after everything has started."""
    path = Path(OmegaConf.select(config, MODEL) or "").expanduser() / "config.json"
    lengths = [OmegaConf.select(config, f"data.{name}") for name in ("max_prompt_length", "max_response_length")]
    if not path.is_file() or None in lengths:
        return
    positions, where = _positions_of(config, path)
    if positions is not None and sum(lengths) > positions:
        yield Problem(
            "data.max_prompt_length + data.max_response_length",
            sum(lengths),
            f"the model has {positions} positions (max_position_embeddings in {where})",
            "Shorten one of them, or choose another model",
        )


def _positions_of(config: DictConfig, path: Path) -> tuple[int | None, Any]:
    """Positions of the model and where that stands: verl lets the config override the model's own file."""
    for key in (f"{OVERRIDES}.model_config", OVERRIDES):
        overridden = OmegaConf.select(config, f"{key}.max_position_embeddings")
        if overridden is not None:
            return overridden, key
    return json.loads(path.read_text()).get("max_position_embeddings"), path


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in {"1", "true", "yes", "on"}


def _is_cached(model_id: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model_id, "config.json"), str)


def _data(key: str, file: str) -> Iterator[Problem]:
    if _is_remote(file):
        return
    path = Path(file).expanduser()
    if not path.is_file():
        yield Problem(key, file, "there is no such file", "Write it with `python -m verl_m2po.tasks --help`")
    elif path.suffix == ".parquet":
        yield from _columns(key, path)


def _columns(key: str, path: Path) -> Iterator[Problem]:
    import pyarrow
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
    except pyarrow.ArrowInvalid as error:
        yield Problem(key, path, f"the file is not valid parquet ({error})", "Write it again")
        return
    missing = [column for column in COLUMNS if column not in schema.names]
    if missing:
        yield Problem(
            key,
            path,
            f"it lacks the column(s) {', '.join(missing)}; it has {', '.join(schema.names)}",
            "Write it with `python -m verl_m2po.tasks`, or add them as verl's documentation describes",
        )
