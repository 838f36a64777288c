"""AdamW whose learning rate is larger for a while, and an agent loop whose rewards take time: a disturbed run of verl.

Both come in by verl's own extension points: `actor.optim.optimizer_impl` and `rollout.agent.agent_loop_config_path`.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

NAME = "slow_verifier"


class DisturbedAdamW(torch.optim.AdamW):
    """Multiplies the learning rate that the schedule says; the updates are not counted across a restart.

    Args:
        params: as AdamW's.
        begins: first optimizer update, from 0, with the larger learning rate.
        ends: first update after them.
        factor: times as large.
        of_adamw: as AdamW's.
    """

    def __init__(self, params: Any, *, begins: int, ends: int, factor: float, **of_adamw: Any) -> None:
        super().__init__(params, **of_adamw)
        self._disturbed, self._factor, self._made = range(begins, ends), factor, 0

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore
        factor = self._factor if self._made in self._disturbed else 1.0
        self._made += 1
        before = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] *= factor
        loss = super().step(closure)
        for group, rate in zip(self.param_groups, before, strict=True):
            group["lr"] = rate
        return loss


class SlowVerifier(SingleTurnAgentLoop):
    """verl's single-turn loop, whose result is there `seconds` after the last token: meanwhile the tokens grow old."""

    def __init__(self, *args: Any, seconds: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._seconds = seconds

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:  # pyright: ignore
        output = await super().run(sampling_params, priority=priority, **kwargs)  # pyright: ignore
        await asyncio.sleep(self._seconds)
        return output


def write_config(path: str, seconds: float) -> None:
    """Write the file that `actor_rollout_ref.rollout.agent.agent_loop_config_path` names."""
    target = f"{SlowVerifier.__module__}.{SlowVerifier.__qualname__}"
    OmegaConf.save(OmegaConf.create([{"name": NAME, "_target_": target, "seconds": seconds}]), path)
