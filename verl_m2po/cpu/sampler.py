"""verl's replay buffers, polled often enough for steps that take a second."""

from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

# verl polls every 2 s and has no setting for it: as long as a whole step of a tiny model.
POLL_INTERVAL_S = 0.05


def replay_buffer(trainer_mode: str, **kwargs: Any) -> ReplayBuffer:
    """Return verl's own buffer for `trainer_mode`, for ``trainer.v1.sampler.custom_sampler``.

    Args:
        trainer_mode: verl's trainer mode.
        kwargs: What verl gives a custom sampler; its settings for group filtering are not among them.
    """
    buffer = ReplayBuffer if trainer_mode == "sync" else ReplayBufferAsync
    return buffer(trainer_mode=trainer_mode, poll_interval=POLL_INTERVAL_S, **kwargs)
