"""Addition of numbers with a fixed number of digits: a task that is made on the spot and scored exactly.

verl finds the reward by ``reward.custom_reward_function.path=pkg://verl_m2po.tasks.arithmetic`` (its ``name`` is verl's
default, ``compute_score``).
"""

import numpy as np

from verl_m2po.tasks.task import Task, check_arguments, split_of, stream_of

DATA_SOURCE = "arithmetic"


def problem(index: int, *, split: str, digits: int = 2, seed: int = 0) -> tuple[int, int]:
    """The two numbers of row `index`, which depends on nothing but the arguments.

    Draws until a pair falls into `split`. Rows are independent draws: a long enough file repeats problems.

    Args:
        index: Position of the row, from 0.
        split: ``train`` or ``validation``.
        digits: Digits of each number, 1 to `MAX_DIGITS`, without leading zeros.
        seed: A whole number, 0 or more.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_arguments(index=index, split=split, digits=digits, seed=seed)
    stream = stream_of(index, seed)
    while True:
        a, b = _draw(stream, digits), _draw(stream, digits)
        if split_of(a, b) == split:
            return a, b


def _draw(stream: np.random.Philox, digits: int) -> int:
    raw = [int(word) for word in stream.random_raw(digits)]
    first = raw[0] % 10 if digits == 1 else 1 + raw[0] % 9
    return int("".join(map(str, [first, *(word % 10 for word in raw[1:])])))


def question_and_answer(a: int, b: int) -> tuple[str, str]:
    """The user message and the response that earns the reward."""
    return f"{a}+{b}", str(a + b)


def _made(index: int, *, split: str, digits: int, seed: int) -> tuple[str, str]:
    return question_and_answer(*problem(index, split=split, digits=digits, seed=seed))


TASK = Task(DATA_SOURCE, _made, longest_answer=lambda digits: digits + 1, digits=2)
compute_score, row, rows, write_parquet = TASK.score, TASK.row, TASK.rows, TASK.write_parquet
