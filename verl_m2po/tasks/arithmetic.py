"""Addition of numbers with a fixed number of digits: a task that is made on the spot and scored exactly.

verl finds the reward by ``reward.custom_reward_function.path=pkg://verl_m2po.tasks.arithmetic`` (its ``name`` is verl's
default, ``compute_score``).
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from verl_m2po.tasks import parquet, scoring

DATA_SOURCE = "arithmetic"
SPLITS = ("train", "validation")
# One unordered pair of numbers in this many is kept for validation.
VALIDATION_ONE_IN = 8
MAX_DIGITS = 64


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float | dict:
    """verl's reward for this task: 1.0 if the whole response is the sum, else 0.0.

    White space around the answer is ignored; anything else besides the digits of the sum (words, a sign, leading zeros)
    is wrong. Rows of other data sets go to verl's own scorers, so that a run can validate on them as well.

    Args:
        data_source: Column of that name; `DATA_SOURCE` for rows of this task.
        solution_str: The decoded response, special tokens removed.
        ground_truth: The sum in decimal digits.
        extra_info: Passed on to verl's scorers; unused here.

    Raises:
        NotImplementedError: verl has no scorer for `data_source`.
    """
    if data_source != DATA_SOURCE:
        return scoring.compute_score(data_source, solution_str, ground_truth, extra_info)
    return float(solution_str.strip() == ground_truth)


def split_of(a: int, b: int) -> str:
    """The split that ``a+b`` belongs to, whatever the seed: a property of the two numbers, not of their order.

    No validation problem can therefore turn up in training, neither in reinforcement learning nor in the supervision of
    the base model, under any seed.
    """
    low, high = sorted((a, b))
    digest = hashlib.blake2b(f"{low}+{high}".encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % VALIDATION_ONE_IN == 0 else "train"


def problem(index: int, *, split: str, digits: int = 2, seed: int = 0) -> tuple[int, int]:
    """The two numbers of row `index`, which depends on nothing but the arguments.

    Draws from a counter-based generator that starts anew for every row until a pair falls into `split`. Rows are
    independent draws: a long enough file repeats problems.

    Args:
        index: Position of the row, from 0.
        split: ``train`` or ``validation``.
        digits: Digits of each number, 1 to `MAX_DIGITS`, without leading zeros.
        seed: A whole number, 0 or more.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check_arguments(index=index, split=split, digits=digits, seed=seed)
    # Raw Philox output: numpy promises to keep that stream, unlike those of its distributions.
    stream = np.random.Philox(np.random.SeedSequence([seed, index]))
    while True:
        a, b = _draw(stream, digits), _draw(stream, digits)
        if split_of(a, b) == split:
            return a, b


def _draw(stream: np.random.Philox, digits: int) -> int:
    raw = [int(word) for word in stream.random_raw(digits)]
    first = raw[0] % 10 if digits == 1 else 1 + raw[0] % 9
    return int("".join(map(str, [first, *(word % 10 for word in raw[1:])])))


def _check_arguments(*, index: int, split: str, digits: int, seed: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"digits={digits} is not between 1 and {MAX_DIGITS}")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index} and seed={seed} must not be negative")


def question_and_answer(a: int, b: int) -> tuple[str, str]:
    """The user message and the response that earns the reward."""
    return f"{a}+{b}", str(a + b)


def row(index: int, *, split: str, digits: int = 2, seed: int = 0) -> parquet.Row:
    """Row `index` for verl; the arguments are those of `problem`."""
    question, answer = question_and_answer(*problem(index, split=split, digits=digits, seed=seed))
    return parquet.make_row(
        data_source=DATA_SOURCE,
        content=question,
        ability="math",
        ground_truth=answer,
        split=split,
        index=index,
        question=question,
        answer=answer,
    )


def rows(count: int, *, split: str, digits: int = 2, seed: int = 0) -> Iterator[parquet.Row]:
    """Rows 0 to `count` - 1; the other arguments are those of `problem`."""
    return (row(index, split=split, digits=digits, seed=seed) for index in range(count))


def write_parquet(
    out: Path, *, train_rows: int = 8192, validation_rows: int = 512, digits: int = 2, seed: int = 0
) -> dict[str, Path]:
    """Write ``train.parquet`` and ``validation.parquet`` into the folder `out` and return their paths by split.

    Args:
        out: Folder, made where it is missing; files of those names are replaced.
        train_rows: Rows to train on, at least 1.
        validation_rows: Rows to validate on, at least 1.
        digits: Digits of each number.
        seed: A whole number, 0 or more.

    Raises:
        ValueError: An argument is out of its range.
        OSError: `out` cannot be written to.
    """
    counts = {"train": train_rows, "validation": validation_rows}
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"{split}_rows={count} must be at least 1")
    return {
        split: parquet.write(rows(count, split=split, digits=digits, seed=seed), Path(out) / f"{split}.parquet")
        for split, count in counts.items()
    }
