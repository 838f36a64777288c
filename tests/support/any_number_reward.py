"""A reward for several turns of the tiny model, which never saw a tool's answer and cannot go on after one."""

import re
from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """verl's reward function: 1.0 if the right number stands anywhere in the response, else 0.0."""
    return float(ground_truth in re.findall(r"\d+", solution_str))
