"""verl's single-turn agent loop with drawn response lengths, or with a seed of its own for every response."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

NAME = "paced"


@dataclass(frozen=True)
class Lengths:
    """Response lengths of what is dispatched in a trainer step, log-normal.

    Args:
        from_step: first trainer step of dispatch, from 1.
        median: tokens.
        sigma: standard deviation of the logarithm; 0: all have the median.
        longest: tokens; what is drawn above is cut.
    """

    from_step: int
    median: float
    sigma: float = 0.0
    longest: int = 1 << 20

    def draw(self, rng: random.Random) -> int:
        """The length of one response, in tokens, at least 1."""
        return max(1, min(self.longest, round(math.exp(rng.gauss(math.log(self.median), self.sigma)))))


def lengths_at(lengths: Sequence[Lengths], step: int) -> Lengths:
    """The lengths that hold in trainer step `step`."""
    return [each for each in lengths if each.from_step <= max(1, step)][-1]


def write_config(path: str, lengths: Sequence[Lengths] = (), is_seeded: bool = False) -> None:
    """Write the file that `actor_rollout_ref.rollout.agent.agent_loop_config_path` names.

    Args:
        path: the file.
        lengths: what to generate, in the order of `from_step`; empty: up to the end-of-sequence token, as always.
        is_seeded: every response is sampled with a seed that follows from its prompt and its number in the group, so
            that what is sampled does not depend on what else is being generated. Not for generations that are resumed:
            the continuation would begin with the same random numbers.
    """
    entry = {
        "name": NAME,
        "_target_": f"{PacedAgentLoop.__module__}.{PacedAgentLoop.__qualname__}",
        "lengths": [[each.from_step, each.median, each.sigma, each.longest] for each in lengths],
        "is_seeded": is_seeded,
    }
    OmegaConf.save(OmegaConf.create([entry]), path)


class PacedAgentLoop(SingleTurnAgentLoop):
    """See `write_config` for the arguments."""

    def __init__(self, *args: Any, lengths: Sequence[Sequence[float]] = (), is_seeded: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lengths = [Lengths(int(a), b, c, int(d)) for a, b, c, d in lengths]
        self._is_seeded = is_seeded

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:  # pyright: ignore
        params = dict(sampling_params)
        step, name = int(kwargs["global_steps"]), f"{kwargs['index']}/{kwargs['session_id']}"
        if self._is_seeded:
            params["seed"] = random.Random(name).randrange(2**31)
        if self._lengths:
            # Validation and training draw alike; a prompt that comes again in a later epoch is as long as before.
            params["max_tokens"] = lengths_at(self._lengths, step).draw(random.Random(name))
            params["ignore_eos"] = True
        return await super().run(params, priority=priority, **kwargs)  # pyright: ignore[reportAbstractUsage]
