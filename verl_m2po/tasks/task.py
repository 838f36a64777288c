"""Tasks that are made on the spot, with just one right response to each problem: its probability is the accuracy."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from verl_m2po.tasks import parquet, scoring

SPLITS = ("train", "validation")
# One unordered pair of numbers in this many is kept for validation.
VALIDATION_ONE_IN = 8
MAX_DIGITS = 64


class MakesProblem(Protocol):
    """Gives question and right response of the problem `index`, which depends on nothing but the arguments."""

    def __call__(self, index: int, *, split: str, digits: int, seed: int) -> tuple[str, str]: ...


@dataclass(frozen=True)
class Task:
    """How to make and to score the rows of a task.

    Args:
        data_source: Its name in verl's rows and metrics, and of its module in this package.
        problem: Makes one problem.
        longest_answer: Of numbers with so many digits, in bytes, which are the tokens of the tiny models.
        digits: Digits of a number where nothing else is said.
    """

    data_source: str
    problem: MakesProblem
    longest_answer: Callable[[int], int]
    digits: int

    @property
    def reward_path(self) -> str:
        """``reward.custom_reward_function.path`` of the task."""
        return f"pkg://{__package__}.{self.data_source}"

    @property
    def accuracy(self) -> str:
        """verl's name of the validation accuracy."""
        return f"val-core/{self.data_source}/acc/mean@1"

    def score(self, data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float | dict:
        """1.0 if the whole response is the right one, white space around it aside, else 0.0.

        Args:
            data_source: Column of that name; rows of other data sets go to verl's own scorers.
            solution_str: The decoded response, special tokens removed.
            ground_truth: The right response.
            extra_info: Passed on to verl's scorers; unused here.

        Raises:
            NotImplementedError: verl has no scorer for `data_source`.
        """
        if data_source != self.data_source:
            return scoring.compute_score(data_source, solution_str, ground_truth, extra_info)
        return float(solution_str.strip() == ground_truth)

    def row(self, index: int, *, split: str, digits: int | None = None, seed: int = 0) -> parquet.Row:
        """Row `index` for verl.

        Args:
            index: Position of the row, from 0.
            split: ``train`` or ``validation``.
            digits: Digits of a number, 1 to `MAX_DIGITS`; None is the task's default.
            seed: A whole number, 0 or more.

        Raises:
            ValueError: An argument is out of its range.
        """
        digits = self.digits if digits is None else digits
        question, answer = self.problem(index, split=split, digits=digits, seed=seed)
        return parquet.make_row(
            data_source=self.data_source,
            content=question,
            ability="math",
            ground_truth=answer,
            split=split,
            index=index,
            question=question,
            answer=answer,
        )

    def rows(self, count: int, *, split: str, digits: int | None = None, seed: int = 0) -> Iterator[parquet.Row]:
        """Rows 0 to `count` - 1; the other arguments are those of `row`."""
        return (self.row(index, split=split, digits=digits, seed=seed) for index in range(count))

    def write_parquet(
        self,
        out: Path,
        *,
        train_rows: int = 8192,
        validation_rows: int = 512,
        digits: int | None = None,
        seed: int = 0,
    ) -> dict[str, Path]:
        """Write ``train.parquet`` and ``validation.parquet`` into the folder `out` and return their paths by split.

        Args:
            out: Folder, made where it is missing; files of those names are replaced.
            train_rows: Rows to train on, at least 1.
            validation_rows: Rows to validate on, at least 1.
            digits: As for `row`.
            seed: As for `row`.

        Raises:
            ValueError: An argument is out of its range.
            OSError: `out` cannot be written to.
        """
        counts = {"train": train_rows, "validation": validation_rows}
        for split, count in counts.items():
            if count < 1:
                raise ValueError(f"{split}_rows={count} must be at least 1")
        return {
            split: parquet.write(
                self.rows(count, split=split, digits=digits, seed=seed), Path(out) / f"{split}.parquet"
            )
            for split, count in counts.items()
        }


def split_of(a: int, b: int) -> str:
    """The split that a problem with ``a`` and ``b`` belongs to: a property of the numbers, not of their order or seed.

    No validation problem can therefore turn up in training, neither in reinforcement learning nor in the supervision of
    the base model, under any seed.
    """
    low, high = sorted((a, b))
    digest = hashlib.blake2b(f"{low}+{high}".encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest, "big") % VALIDATION_ONE_IN == 0 else "train"


def stream_of(index: int, seed: int) -> np.random.Philox:
    """A counter-based generator that starts anew for every row, so that a row needs no other row.

    Raw Philox output: numpy promises to keep that stream, unlike those of its distributions.
    """
    return np.random.Philox(np.random.SeedSequence([seed, index]))


def check_arguments(*, index: int, split: str, digits: int, seed: int) -> None:
    """Raise a ValueError that names the argument that is out of its range."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    if not 1 <= digits <= MAX_DIGITS:
        raise ValueError(f"digits={digits} is not between 1 and {MAX_DIGITS}")
    if index < 0 or seed < 0:
        raise ValueError(f"index={index} and seed={seed} must not be negative")
