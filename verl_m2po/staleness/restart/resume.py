"""What may differ between the run that wrote a checkpoint and the run that goes on from it.

A checkpoint carries the settings that it was written under (`settings_of`); a run that
resumes compares them with its own (`check`) before any worker is started.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_m2po.ground.problem import Problem
from verl_m2po.staleness.config import MODE_DEFAULTS, is_chosen
from verl_m2po.staleness.restart.checkpoint import FOLDER, MANIFEST, CheckpointError, Checkpoints

logger = logging.getLogger(__name__)

STATE_FILE = "staleness.json"
"""In `global_step_N`, beside verl's own files: the state of the buffer and of the trainer process."""

STATE_FORMATS = (1, 2)
"""Formats of the state file that this version reads; it writes the last. Format 1 has no settings and no manifest."""

_SHARD = re.compile(r"^model_world_size_(\d+)_rank_\d+\.pt$")

MODE = "trainer.v1.trainer_mode"
MODEL = "actor_rollout_ref.model.path"

_REFUSED = {
    MODE: "the modes count batches and learning-rate steps differently",
    "data.train_batch_size": "its buffered rollouts have the ages of the old schedule",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "it counts ages in optimizer updates of another size",
    "actor_rollout_ref.actor.ppo_epochs": "it counts ages in optimizer updates, of which a step made others",
    "actor_rollout_ref.rollout.n": "its buffered groups have the old number of responses",
    "actor_rollout_ref.actor.strategy": "verl's checkpoints of one engine cannot be loaded into another",
}
"""Settings that must be those of the checkpoint, and why. The staleness of the mode is one more."""

REINCARNATION = "trainer.v1.replay.reference.reincarnate_after_steps"

_MENTIONED = (
    "trainer.v1.bounded_async.adaptive",
    REINCARNATION,
    "actor_rollout_ref.actor.policy_loss",
    "actor_rollout_ref.actor.optim",
    "actor_rollout_ref.actor.loss_agg_mode",
    "actor_rollout_ref.actor.use_kl_loss",
    "actor_rollout_ref.actor.kl_loss_coef",
    "actor_rollout_ref.actor.entropy_coeff",
    "actor_rollout_ref.actor.clip_ratio",
    MODEL,
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.seed",
    "algorithm",
    "data.train_files",
    "data.seed",
    "data.shuffle",
    "data.max_prompt_length",
    "data.max_response_length",
)
"""Sections and keys that may change; the run goes on with the new value and says so."""

# verl fills it in at the start, from the length of the run.
_NOT_SETTINGS = ("actor_rollout_ref.actor.optim.total_training_steps",)


def staleness_key(mode: str) -> str:
    """Configuration key of the staleness of a mode."""
    return f"trainer.v1.{mode}.staleness_updates"


def refused_keys(mode: str) -> list[str]:
    """Settings without which neither a checkpoint nor a journal fits a run of `mode`."""
    return list(_refused_keys(mode))


def _refused_keys(mode: str) -> dict[str, str]:
    refused = {**_REFUSED, staleness_key(mode): "its buffered rollouts have the ages of the old schedule"}
    if "replay" in MODE_DEFAULTS.get(mode, {}):
        why = "its buffered rollouts were trained, and are kept to be trained again, by the old settings"
        refused |= {f"trainer.v1.{mode}.replay.{key}": why for key in ("max_uses", "fresh_share", "sampling")}
    return refused


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, child in value.items():
        leaves |= _flat(f"{prefix}.{key}", child)
    return leaves


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The settings of a run that a checkpoint depends on, by full key, as plain JSON.

    Args:
        config: verl's configuration; call it before verl fills in what it derives.
    """
    mode = config.trainer.v1.trainer_mode
    settings: dict[str, Any] = {}
    for key in (*_refused_keys(mode), *_MENTIONED):
        value = OmegaConf.select(config, key)
        settings |= _flat(key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value)
    return {key: value for key, value in settings.items() if key not in _NOT_SETTINGS}


def find(trainer: DictConfig) -> Path | None:
    """The checkpoint that verl's settings say to resume from; None starts from scratch.

    Args:
        trainer: verl's `trainer` section.

    Raises:
        CheckpointError: there is none where they say.
    """
    match trainer.resume_mode:
        case "disable":
            return None
        case "auto":
            return Checkpoints(trainer.default_local_dir).latest()
        case "resume_path":
            path = trainer.resume_from_path
            folder = Path(path) if isinstance(path, str) and path else None
            if folder is None or not FOLDER.match(folder.name) or not folder.is_dir():
                raise CheckpointError(
                    f"trainer.resume_from_path={path}: not a checkpoint folder, whose name is global_step_N"
                )
            return folder.absolute()
        case other:
            raise CheckpointError(f"trainer.resume_mode={other}: it is one of auto, disable, resume_path")


def read_state(folder: Path) -> dict[str, Any]:
    """The state file of a checkpoint, after every file of the checkpoint has been found to be what was written.

    Raises:
        CheckpointError: a file is missing, truncated or foreign.
        FileNotFoundError: another trainer mode wrote the checkpoint.
    """
    path = folder / STATE_FILE
    if not path.exists() and not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{path} is missing: the checkpoint was not written by a trainer mode of verl-m2po, and the ages of its "
            "rollouts are unknown. Resume with the mode that wrote it, or set trainer.resume_mode=disable"
        )
    if not (folder / MANIFEST).exists() and _state_version(path) == 1:
        logger.warning("%s has no checksums: an older verl-m2po wrote it. It is resumed from unchecked", folder)
    else:
        Checkpoints(folder.parent).require_whole(folder)
    return json.loads(path.read_text())


def _state_version(path: Path) -> Any:
    try:
        return json.loads(path.read_text())["state_version"]
    except (ValueError, KeyError, TypeError):
        return None


def problems(config: DictConfig) -> list[Problem]:
    """What keeps `config` from going on from the checkpoint that it would resume from, without reading much of it.

    For verl's own modes: they load a checkpoint of ours without a word, and skip every prompt in its buffer.
    """
    try:
        folder = find(config.trainer)
    except CheckpointError as error:
        return [Problem("trainer.resume_mode", config.trainer.resume_mode, str(error), "")]
    if folder is not None and not is_chosen(config) and str(config.trainer.resume_from_path).endswith("/"):
        why = "verl reads the step from what follows global_step_, and a slash is no number"
        return [Problem("trainer.resume_from_path", config.trainer.resume_from_path, why, "Remove the last slash")]
    path = folder / STATE_FILE if folder else None
    if folder is None or path is None or not path.exists() or _state_version(path) is None:
        return []  # a broken file is named, with all others, when the checkpoint is loaded
    state = json.loads(path.read_text())
    return check(folder, state, settings_of(config), ranks_of(config))


def ranks_of(config: DictConfig) -> int:
    """Ranks of the actor."""
    return config.trainer.nnodes * config.trainer.n_gpus_per_node


def check(folder: Path, state: Mapping[str, Any], settings: Mapping[str, Any], ranks: int) -> list[Problem]:
    """What keeps a run from going on from a checkpoint, and what it should know when it does.

    Args:
        folder: the checkpoint, `global_step_N`.
        state: its staleness state.
        settings: `settings_of` the run that wants to go on.
        ranks: its `ranks_of`.
    """
    if problems := _check_format(folder, state):
        return problems
    return [*_check_settings(folder, state.get("settings") or {}, settings), *_check_ranks(folder, ranks)]


def _check_format(folder: Path, state: Mapping[str, Any]) -> list[Problem]:
    found = state.get("state_version")
    if found in STATE_FORMATS:
        return []
    return [
        Problem(
            "checkpoint",
            folder,
            f"its staleness state has format {found!r}, this version of verl-m2po reads {STATE_FORMATS[0]} to "
            f"{STATE_FORMATS[-1]}",
            "Resume with the version of verl-m2po that wrote it",
        )
    ]


def _check_settings(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    """Format 1 recorded no settings; the rule still compares itself, its staleness and its batch size when it loads."""
    refused = _refused_keys(new[MODE]) | _refused_by_now(folder, old, new)
    problems = []
    for key in (key for key in new if key in old and old[key] != new[key]):
        if key in refused:
            why = f"{folder.name} was written with {old[key]!r}: {refused[key]}"
            value = "null" if old[key] is None else old[key]  # Hydra's word for it
            remedy = f"Resume with {key}={value}, or start a new run in another trainer.default_local_dir"
            problems.append(Problem(key, new[key], why, remedy))
        else:
            why = f"{folder.name} was written with {old[key]!r}; the run goes on with the new value"
            problems.append(Problem(key, new[key], why, "Change it back if that is not meant", is_fatal=False))
    return problems


def _refused_by_now(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Settings that may change until what they speak of has happened, and why they may not after it."""
    if new[MODE] != "replay":
        return {}
    match = FOLDER.match(folder.name)
    step = int(match[1]) if match else 0
    moments = [settings.get(REINCARNATION) for settings in (old, new)]
    if not any(isinstance(moment, int) and moment < step for moment in moments):
        return {}
    return {REINCARNATION: "it is past that step, and its KL loss would be taken to another reference than before"}


def _check_ranks(folder: Path, ranks: int) -> list[Problem]:
    """verl's FSDP checkpoints hold one shard per rank, and are loaded by as many ranks only."""
    written = ranks_written(folder)
    if not written or written == {ranks}:
        return []
    count = ", ".join(map(str, sorted(written)))
    return [
        Problem(
            "trainer.nnodes x trainer.n_gpus_per_node",
            ranks,
            f"{folder.name} holds shards for {count} rank(s), and verl loads an FSDP checkpoint on as many ranks only",
            f"Resume on {count} rank(s), or merge the shards with `python -m verl.model_merger merge` and start a new "
            "run from the merged model",
        )
    ]


def ranks_written(folder: Path) -> set[int]:
    """Numbers of ranks whose FSDP shards are in the checkpoint `folder`; empty for other engines."""
    actor = folder / "actor"
    names = [path.name for path in actor.iterdir()] if actor.is_dir() else []
    return {int(match[1]) for match in map(_SHARD.match, names) if match}


def require_all_shards(folder: Path) -> None:
    """Notice right after writing that some ranks wrote to a disk of their own.

    Raises:
        FileNotFoundError: naming the shards that are not there.
    """
    for ranks in ranks_written(folder):
        names = [f"model_world_size_{ranks}_rank_{rank}.pt" for rank in range(ranks)]
        if missing := [name for name in names if not (folder / "actor" / name).exists()]:
            raise FileNotFoundError(
                f"{', '.join(missing)} not in {folder / 'actor'}: trainer.default_local_dir must be on a filesystem "
                "that all nodes share"
            )
