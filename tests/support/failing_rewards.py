"""A reward function that fails for some of the prompts, in every way in which one can."""

import asyncio
import math
from typing import Any

from verl_m2po.tasks import arithmetic

EVERY, HANGING = 10, 476
"""A tenth of the prompts fail; this one, among the first that are drawn with seed 1, never gets an answer."""


def fails(index: int) -> bool:
    return index % EVERY == 0 or index == HANGING


async def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward function; raises, returns NaN, infinity or nothing, or never returns, by the prompt's index."""
    index = extra_info["index"]
    if index == HANGING:
        await asyncio.sleep(3600)
    if not fails(index):
        return arithmetic.compute_score(data_source, solution_str, ground_truth, extra_info)
    match index // EVERY % 5:  # of those drawn in eight steps with seed 1 each case has some
        case 1:
            return math.nan
        case 3:
            return math.inf
        case 4:
            return None  # type: ignore[return-value]
    raise ZeroDivisionError("in the reward function")
