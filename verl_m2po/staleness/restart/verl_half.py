"""verl's half of a checkpoint, written where ours is written: verl's own `_save_checkpoint` with other settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig, open_dict


class Host(Protocol):
    """What saving asks of verl's trainer."""

    config: DictConfig
    global_steps: int
    use_critic: bool


class NoCallback:
    """Stands in for the user's checkpoint callback. verl 0.9.0 knows no callbacks, so this is no class of verl's."""

    def on_save(self, **about: Any) -> None:
        """Do nothing."""


def callback_of(trainer: Host) -> Any:
    """The user's checkpoint callback; one that does nothing where verl has none."""
    return getattr(trainer, "checkpoint_callback", NoCallback())


@contextmanager
def written_into(trainer: Any, folder: Path) -> Iterator[None]:
    """Let verl's `_save_checkpoint` write its checkpoint, its pointer included, into `folder`, and delete nothing.

    verl deletes the model of an old checkpoint before the new one is complete, and never the rest of it.
    """
    section, callback = trainer.config.trainer, callback_of(trainer)
    redirected = {
        "default_local_dir": str(folder),
        "max_actor_ckpt_to_keep": None,
        "max_critic_ckpt_to_keep": None,
        "remove_previous_ckpt_in_save": False,
    }
    configured = {key: section[key] for key in redirected if key in section}
    trainer.checkpoint_callback = NoCallback()
    try:
        with open_dict(section):
            section.update(redirected)
        yield
    finally:
        with open_dict(section):
            for key in redirected:
                del section[key]
            section.update(configured)
        trainer.checkpoint_callback = callback


def checkpoints_to_keep(trainer: Host) -> int | None:
    """Whole checkpoints to keep: the most that verl's settings ask for, None for all."""
    section = trainer.config.trainer
    if section.get("remove_previous_ckpt_in_save"):
        return 1
    limits = [section.get("max_actor_ckpt_to_keep")]
    if trainer.use_critic:
        limits.append(section.get("max_critic_ckpt_to_keep"))
    return None if None in limits else max(limits)
