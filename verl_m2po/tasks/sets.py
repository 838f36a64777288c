"""The public data sets that ``prepare`` knows, as one table: where they are, what a column means, who scores them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from verl_m2po.tasks.scoring import MATH_VERIFY


class UnusableRow(ValueError):
    """A row that cannot be trained or validated on; the message is the reason."""


def after_hashes(answer: Any) -> str:
    """The number after the last ``####``, as verl's scorer of GSM8K compares it: without thousands separators."""
    _, marker, number = str(answer).rpartition("####")
    number = number.strip().replace(",", "").replace("$", "")
    if not marker:
        raise UnusableRow("the answer has no ####")
    if not re.fullmatch(r"-?[0-9.]+", number):
        raise UnusableRow(f"what follows #### is not a number: {number!r}")
    return number


def whole_number(answer: Any) -> str:
    """A whole number as people write it: ``025`` is 25 and ``27.0`` is 27."""
    try:
        number = Decimal(str(answer).strip())
    except InvalidOperation:
        raise UnusableRow(f"the answer is not a number: {answer!r}") from None
    if not number.is_finite() or number != number.to_integral_value():
        raise UnusableRow(f"the answer is not a whole number: {answer!r}")
    return str(int(number))


def latex(answer: Any) -> str:
    """LaTeX without the dollar signs around it; the parts of a list, or of ``$a$, $b$``, stay separated by commas."""
    parts = answer if isinstance(answer, list) else [answer]
    # `\$` is a currency sign and stays.
    text = ", ".join(re.sub(r"(?<!\\)\$", "", str(part)).strip() for part in parts if part is not None)
    if not text:
        raise UnusableRow("the answer is empty")
    return text


def last_boxed(solution: Any) -> str:
    """What the last ``\\boxed{}`` of a worked solution holds, found by verl's own function."""
    from verl.utils.reward_score.math_reward import last_boxed_only_string, remove_boxed

    boxed = last_boxed_only_string(str(solution))
    if boxed is None or not boxed.startswith("\\boxed"):
        raise UnusableRow("the solution has no \\boxed{} answer")
    return latex(remove_boxed(boxed))


HASHES = 'Let\'s think step by step and output the final answer after "####".'
BOXED = "Let's think step by step and output the final answer within \\boxed{}."


@dataclass(frozen=True)
class DataSet:
    """One public data set.

    Args:
        name: What ``prepare`` is called with.
        title: What people call it.
        hub: Its name on the Hugging Face hub.
        splits: Our split, which names the file written, to the hub's split.
        question: Columns that may hold the question; the first that a source has is used.
        answer: Columns that may hold the answer and how the ground truth is taken from them, in the same way.
        data_source: What chooses the scorer, and names the metric ``val-core/<data_source>/...``.
        instruction: Appended to the question, in the words of verl's own examples.
        answered: How a response states an answer, with ``{}`` for the ground truth.
        config: The hub's configuration; None where there is just one.
    """

    name: str
    title: str
    hub: str
    splits: Mapping[str, str]
    question: tuple[str, ...]
    answer: Mapping[str, Callable[[Any], str]]
    data_source: str
    instruction: str = BOXED
    answered: str = "The answer is $\\boxed{{{}}}$."
    config: str | None = None


_TABLE = (
    DataSet(
        name="gsm8k",
        title="GSM8K",
        hub="openai/gsm8k",
        config="main",
        splits={"train": "train", "test": "test"},
        question=("question",),
        answer={"answer": after_hashes},
        data_source="openai/gsm8k",
        instruction=HASHES,
        answered="#### {}",
    ),
    DataSet(
        name="math500",
        title="MATH-500",
        hub="HuggingFaceH4/MATH-500",
        splits={"test": "test"},
        question=("problem",),
        answer={"answer": latex},
        data_source="HuggingFaceH4/MATH-500",
    ),
    DataSet(
        name="aime24",
        title="AIME 2024",
        hub="HuggingFaceH4/aime_2024",
        splits={"test": "train"},
        question=("problem",),
        answer={"answer": whole_number},
        data_source="aime24",
    ),
    DataSet(
        name="aime25",
        title="AIME 2025",
        hub="math-ai/aime25",
        splits={"test": "test"},
        question=("problem",),
        answer={"answer": whole_number},
        data_source="aime25",
    ),
    DataSet(
        name="amc23",
        title="AMC 2023",
        hub="math-ai/amc23",
        splits={"test": "test"},
        question=("question", "problem"),
        answer={"answer": whole_number},
        data_source=f"{MATH_VERIFY}amc23",
    ),
    DataSet(
        name="amc24",
        title="AMC 2024",
        hub="rawsh/2024_AMC12",
        splits={"test": "train"},
        question=("problem", "question"),
        answer={"answer": latex},
        data_source=f"{MATH_VERIFY}amc24",
    ),
    DataSet(
        name="gaokao",
        title="Gaokao 2023, English",
        hub="MARIO-Math-Reasoning/Gaokao2023-Math-En",
        splits={"test": "train"},
        question=("question",),
        answer={"answer": latex},
        data_source=f"{MATH_VERIFY}gaokao",
    ),
    DataSet(
        name="minerva",
        title="Minerva Math",
        hub="math-ai/minervamath",
        splits={"test": "test"},
        question=("question", "problem"),
        answer={"answer": latex, "solution": last_boxed},
        data_source=f"{MATH_VERIFY}minerva",
    ),
    DataSet(
        name="olympiad",
        title="OlympiadBench, English, text only",
        hub="math-ai/olympiadbench",
        splits={"test": "test"},
        question=("question",),
        answer={"final_answer": latex},
        data_source=f"{MATH_VERIFY}olympiad",
    ),
    DataSet(
        name="deepscaler",
        title="DeepScaleR-Preview",
        hub="agentica-org/DeepScaleR-Preview-Dataset",
        splits={"train": "train"},
        question=("problem",),
        answer={"answer": latex},
        data_source=f"{MATH_VERIFY}deepscaler",
    ),
)
DATA_SETS = {data_set.name: data_set for data_set in _TABLE}
