"""verl's single-turn agent loop that returns its trajectory twice, as loops do that cut one session into several."""

from copy import deepcopy
from typing import Any

from omegaconf import OmegaConf
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

NAME = "twice"


def write_config(path: str) -> None:
    """Write the file that `actor_rollout_ref.rollout.agent.agent_loop_config_path` names."""
    target = f"{TwiceAgentLoop.__module__}.{TwiceAgentLoop.__qualname__}"
    OmegaConf.save(OmegaConf.create([{"name": NAME, "_target_": target}]), path)


class TwiceAgentLoop(SingleTurnAgentLoop):
    """Each session gives two rows."""

    async def run(self, *args: Any, **kwargs: Any) -> list:  # pyright: ignore
        output = await super().run(*args, **kwargs)
        return [deepcopy(output), output]
