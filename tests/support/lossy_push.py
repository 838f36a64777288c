"""Keeps a push of weights from one rollout server of a run: the server goes on with the weights that it has.

verl imports this module in every process where VERL_USE_EXTERNAL_MODULES names it. Whoever finds the file that
`FLAG` names removes it, and throws away the weights that it is sent next.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

FLAG = "M2PO_TEST_KEEP_NEXT_PUSH_FROM_ONE"


def environment(flag: Path) -> dict[str, str]:
    """The variables of a run that can be hit; one server misses the next push once `flag` exists."""
    return {"VERL_USE_EXTERNAL_MODULES": __name__, FLAG: str(flag)}


def _is_hit() -> bool:
    try:
        Path(os.environ[FLAG]).unlink()
    except FileNotFoundError:
        return False
    return True


def _lose_pushes(vllm_rollout: ModuleType) -> None:
    update: Callable[..., Any] = vllm_rollout.ServerAdapter.update_weights

    async def update_or_not(self: Any, weights: Any, global_steps: int | None = None, **kwargs: Any) -> None:
        if not _is_hit():
            return await update(self, weights, global_steps=global_steps, **kwargs)
        async for _ in _each(weights):
            pass

    vllm_rollout.ServerAdapter.update_weights = update_or_not


async def _each(weights: Any) -> Any:
    if hasattr(weights, "__aiter__"):
        async for each in weights:
            yield each
    else:
        for each in weights:
            yield each


if FLAG in os.environ:
    wrapt.register_post_import_hook(_lose_pushes, "verl.workers.rollout.vllm_rollout.vllm_rollout")
