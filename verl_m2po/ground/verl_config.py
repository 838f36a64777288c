"""How verl's config is read: one way, so that a check that falls over can say where it was looking."""

from contextvars import ContextVar
from typing import Any

from omegaconf import DictConfig, OmegaConf

TRAINER_MODE = "trainer.v1.trainer_mode"

_last_key: ContextVar[str] = ContextVar("last_key", default="")


def read(config: DictConfig, key: str, default: Any = None) -> Any:
    """The value at the dotted `key`; `default` where there is none. null is None, whatever the default.

    Raises:
        omegaconf.errors.OmegaConfBaseException: an interpolation on the way leads nowhere.
    """
    _last_key.set(key)
    found = OmegaConf.select(config, key, default=_ABSENT)
    return default if found is _ABSENT else found


_ABSENT = object()


def last_key() -> str:
    """The key that was read last in this context; empty before any."""
    return _last_key.get()


def forget_last_key() -> None:
    """Begin anew: what is read from now on belongs to another question."""
    _last_key.set("")


def has_proximal_policy(config: DictConfig) -> bool:
    """Whether verl recomputes `old_log_probs` and puts the age of the data into weights proximal over behaviour policy.

    Recomputed without such weights, the age would be in no ratio that a loss sees.
    """
    if read(config, "algorithm.rollout_correction.bypass_mode", False):
        return False
    return any(read(config, f"algorithm.rollout_correction.{key}") is not None for key in ("rollout_is", "rollout_rs"))


def trains_an_adapter(config: DictConfig) -> bool:
    """Whether the actor trains LoRA adapters, by any of the three keys that verl reads."""
    ranks = (read(config, f"actor_rollout_ref.model.{key}") for key in ("lora_rank", "lora.rank"))
    has_rank = any(isinstance(rank, int) and rank > 0 for rank in ranks)
    return has_rank or read(config, "actor_rollout_ref.model.lora_adapter_path") is not None


def only_validates(config: DictConfig) -> bool:
    """Whether the run ends after its first validation. Without that one verl trains, whatever `val_only` says."""
    return bool(read(config, "trainer.val_only", False) and read(config, "trainer.val_before_train", True))


def overridden_keys(config: DictConfig) -> list[str]:
    """Keys that were set by hand: those of the command line's overrides, without `+`, in order."""
    overrides = read(config, "hydra.overrides.task", [])
    return [str(override).lstrip("+~").partition("=")[0] for override in overrides]
