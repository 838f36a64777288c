"""Addition written out column by column, with carries: a task with responses of 60 to 120 tokens, scored exactly.

A question lists the digits of two numbers column by column, from the right; the response says for each column the carry
and the digit of the sum: ``78 36 .. ..`` is 37+68 of at most four digits, and its response ``15 10``, for 105. Dots
stand where the numbers have ended, so that all questions are of one length while responses are not. One wrong column in
forty makes the whole response wrong.

verl finds the reward by ``reward.custom_reward_function.path=pkg://verl_m2po.tasks.column_addition`` (its ``name`` is
verl's default, ``compute_score``).
"""

from collections.abc import Sequence

from verl_m2po.tasks.task import Task, check_arguments, split_of, stream_of

DATA_SOURCE = "column_addition"
# Bytes of a column with what separates it from the next
COLUMN = 3
NO_DIGITS = ".."


def problem(index: int, *, split: str, digits: int = 40, seed: int = 0) -> tuple[list[int], list[int]]:
    """The digits of the two numbers of row `index`, from the right; it depends on nothing but the arguments.

    Args:
        index: Position of the row, from 0.
        split: ``train`` or ``validation``.
        digits: Digits of the longest numbers; both numbers of a row have as many, from half of it on. Leading zeros
            are digits too.
        seed: A whole number, 0 or more.

    Raises:
        ValueError: An argument is out of its range.
    """
    check_arguments(index=index, split=split, digits=digits, seed=seed)
    stream = stream_of(index, seed)
    while True:
        least = (digits + 1) // 2
        count = least + int(stream.random_raw()) % (digits - least + 1)
        drawn = [int(word) % 10 for word in stream.random_raw(2 * count)]
        a, b = drawn[:count], drawn[count:]
        if split_of(_number(a), _number(b)) == split:
            return a, b


def question_and_answer(a: Sequence[int], b: Sequence[int], digits: int) -> tuple[str, str]:
    """The user message and the response that earns the reward.

    Args:
        a: Digits of a number, from the right.
        b: As many of the other one.
        digits: Columns of the question.
    """
    columns = [f"{x}{y}" for x, y in zip(a, b, strict=True)]
    answer, carry = [], 0
    for x, y in zip(a, b, strict=True):
        carry, digit = divmod(x + y + carry, 10)
        answer.append(f"{carry}{digit}")
    return " ".join([*columns, *[NO_DIGITS] * (digits - len(columns))]), " ".join(answer)


def _number(from_the_right: Sequence[int]) -> int:
    return int("".join(map(str, reversed(from_the_right))))


def _made(index: int, *, split: str, digits: int, seed: int) -> tuple[str, str]:
    return question_and_answer(*problem(index, split=split, digits=digits, seed=seed), digits)


TASK = Task(DATA_SOURCE, _made, longest_answer=lambda digits: COLUMN * digits - 1, digits=40)
compute_score = TASK.score
