"""Column addition: the laws of its problems, and that its reward is for the whole chain."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.tasks import column_addition, tiny_model
from verl_m2po.tasks.made import TASKS
from verl_m2po.tasks.task import MAX_DIGITS, SPLITS, split_of

indices, seeds = st.integers(0, 10**6), st.integers(0, 2**32 - 1)
digit_counts, splits = st.integers(1, MAX_DIGITS), st.sampled_from(SPLITS)


def number(from_the_right: list[int]) -> int:
    return sum(digit * 10**place for place, digit in enumerate(from_the_right))


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_the_chain_spells_the_sum_and_its_carries(index: int, seed: int, digits: int, split: str) -> None:
    a, b = column_addition.problem(index, split=split, digits=digits, seed=seed)
    _, answer = column_addition.question_and_answer(a, b, digits)
    columns = answer.split(" ")
    total = number([int(column[1]) for column in columns]) + 10 ** len(a) * int(columns[-1][0])
    assert total == number(a) + number(b)
    carries = [int(column[0]) for column in columns]
    assert carries == [(number(a[:n]) + number(b[:n])) // 10**n for n in range(1, len(a) + 1)]


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_questions_are_of_one_length_and_responses_of_half_of_it_to_all(
    index: int, seed: int, digits: int, split: str
) -> None:
    a, b = column_addition.problem(index, split=split, digits=digits, seed=seed)
    assert digits / 2 <= len(a) == len(b) <= digits
    assert split_of(number(a), number(b)) == split
    question, answer = column_addition.question_and_answer(a, b, digits)
    assert len(question) == 3 * digits - 1
    assert len(answer) == 3 * len(a) - 1 <= column_addition.TASK.longest_answer(digits)


def test_all_lengths_are_there() -> None:
    lengths = {len(column_addition.problem(index, split="train")[0]) for index in range(600)}
    assert lengths == set(range(20, 41))


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_the_reward_is_for_the_whole_chain_alone(index: int, seed: int, digits: int, split: str) -> None:
    row = column_addition.TASK.row(index, split=split, digits=digits, seed=seed)
    truth = row["reward_model"]["ground_truth"]

    def score(response: str) -> float | dict:
        return column_addition.compute_score(row["data_source"], response, truth)

    assert score(truth) == score(f" {truth}\n") == 1.0
    wrong_digit = str((int(truth[-1]) + 1) % 10)
    assert [score(text) for text in (truth[:-1] + wrong_digit, truth[:-1], f"{truth} 00", "")] == [0.0] * 4


def test_rows_of_other_sets_go_to_verls_scorers() -> None:
    assert column_addition.compute_score("openai/gsm8k", "#### 12", "12") == 1.0


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_a_task_is_found_by_the_path_of_its_reward_function(task) -> None:
    from importlib import import_module

    module = import_module(task.reward_path.removeprefix("pkg://"))
    assert module.TASK is task and callable(module.compute_score)


def test_a_base_model_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task='subtraction' is not one of arithmetic, column_addition"):
        tiny_model.Recipe(task="subtraction")
