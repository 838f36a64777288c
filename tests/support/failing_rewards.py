"""A reward function that fails for some of the prompts, in every way in which one can, and for single trajectories."""

import asyncio
import math
from collections import Counter
from typing import Any

from verl_m2po.tasks import arithmetic

EVERY, HANGING = 10, 476
"""A tenth of the prompts fail; this one, among the first that are drawn with seed 1, never gets an answer."""

_calls: Counter[int] = Counter()


def fails(index: int) -> bool:
    return index % EVERY == 0 or index == HANGING


def fails_once(index: int) -> bool:
    """For another tenth of the prompts the first response that is scored fails, and the others do not."""
    return index % EVERY == EVERY // 2


async def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward function; raises, returns NaN, infinity or nothing, or never returns, by the prompt's index."""
    index = extra_info["index"]
    if index == HANGING:
        await asyncio.sleep(3600)
    if not fails(index):
        return await compute_score_failing_once(data_source, solution_str, ground_truth, extra_info)
    match index // EVERY % 5:  # of those drawn in eight steps with seed 1 each case has some
        case 1:
            return math.nan
        case 3:
            return math.inf
        case 4:
            return None  # type: ignore[return-value]
    raise ZeroDivisionError("in the reward function")


async def compute_score_failing_once(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> float:
    """Raises, or returns NaN, for the first response of some prompts, and for no whole group."""
    index = extra_info["index"]
    _calls[index] += 1
    if fails_once(index) and _calls[index] == 1:
        if index // EVERY % 2:
            return math.nan
        raise ArithmeticError("at its first response")
    return arithmetic.compute_score(data_source, solution_str, ground_truth, extra_info)
