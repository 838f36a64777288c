"""Prompts of the data set: their names, and whether there are enough."""

from typing import Any

from tensordict import TensorDict


def _plain(index: Any) -> int | str:
    """A data set's index as JSON can hold it: data sets number their prompts, or name them."""
    value = index.item() if hasattr(index, "item") else index
    return value if isinstance(value, int) else str(value)


def indices(batch: TensorDict) -> list[int | str]:
    """Positions or names of prompts in the data set, -1 where it has none."""
    return [_plain(index) for index in batch["index"]] if "index" in batch else [-1] * len(batch)


def require_a_batch(prompts: int, batch_size: int) -> None:
    """Refuse a training set that does not fill a batch: verl would make epochs without steps.

    Raises:
        ValueError: it does not.
    """
    if prompts < batch_size:
        raise ValueError(
            f"the training set has {prompts} prompts, fewer than data.train_batch_size={batch_size}. Lower it, with "
            "actor_rollout_ref.actor.ppo_mini_batch_size, or give data.train_files more prompts; those longer than "
            "data.max_prompt_length are left out where data.filter_overlong_prompts=true"
        )
