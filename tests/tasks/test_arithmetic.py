"""Laws of the arithmetic task: rows without state, splits without overlap, exact reward."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.tasks import arithmetic, parquet, task

splits = st.sampled_from(task.SPLITS)
indices = st.integers(0, 2**40)
seeds = st.integers(0, 2**64)
digit_counts = st.integers(1, task.MAX_DIGITS)


def score(response: str, truth: str) -> float:
    result = arithmetic.compute_score(arithmetic.DATA_SOURCE, response, truth)
    assert isinstance(result, float)
    return result


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_a_row_needs_no_other_row(index: int, seed: int, digits: int, split: str) -> None:
    first = arithmetic.row(index, split=split, digits=digits, seed=seed)
    arithmetic.row(index + 1, split=split, digits=digits, seed=seed)
    assert arithmetic.row(index, split=split, digits=digits, seed=seed) == first


@pytest.mark.parametrize("split", task.SPLITS)
def test_a_longer_file_begins_with_the_shorter_one(split: str) -> None:
    longer = list(arithmetic.rows(50, split=split, seed=3))
    assert list(arithmetic.rows(20, split=split, seed=3)) == longer[:20]
    assert [arithmetic.row(index, split=split, seed=3) for index in reversed(range(50))] == longer[::-1]


def test_rows_do_not_change_between_releases() -> None:
    # Written down once: a change here silently changes every published run.
    found = [arithmetic.problem(index, split="train", digits=2, seed=0) for index in range(4)]
    assert found == [(25, 59), (19, 38), (35, 70), (34, 19)]


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_numbers_have_the_digits_asked_for(index: int, seed: int, digits: int, split: str) -> None:
    a, b = arithmetic.problem(index, split=split, digits=digits, seed=seed)
    assert len(str(a)) == len(str(b)) == digits


@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6))
def test_both_orders_of_a_sum_are_on_the_same_side(a: int, b: int) -> None:
    assert task.split_of(a, b) == task.split_of(b, a)


def test_no_validation_problem_is_trained_on_under_any_seed() -> None:
    def problems(split: str, seed: int) -> set[frozenset[int]]:
        rows = (arithmetic.problem(index, split=split, digits=2, seed=seed) for index in range(2000))
        return {frozenset(pair) for pair in rows}

    validation = problems("validation", 0) | problems("validation", 1)
    assert validation.isdisjoint(problems("train", 0) | problems("train", 2))
    assert len(validation) > 300, "the law would hold for an empty split, too"


def test_each_split_has_its_share_of_all_problems() -> None:
    pairs = list(itertools.combinations_with_replacement(range(10, 100), 2))
    share = sum(task.split_of(a, b) == "validation" for a, b in pairs) / len(pairs)
    assert share == pytest.approx(1 / task.VALIDATION_ONE_IN, rel=0.15)


def test_every_digit_is_as_likely_as_any_other() -> None:
    rows = [arithmetic.problem(index, split="train", digits=2, seed=1) for index in range(4000)]
    last_digits = [a % 10 for a, _ in rows] + [b % 10 for _, b in rows]
    # 8,000 draws at 1/10 each: 800 with a standard deviation of 27.
    assert all(800 - 135 < last_digits.count(digit) < 800 + 135 for digit in range(10))


@given(index=indices, seed=seeds, digits=digit_counts, split=splits)
def test_the_reward_is_for_the_sum_alone(index: int, seed: int, digits: int, split: str) -> None:
    a, b = arithmetic.problem(index, split=split, digits=digits, seed=seed)
    truth = arithmetic.row(index, split=split, digits=digits, seed=seed)["reward_model"]["ground_truth"]
    assert score(str(a + b), truth) == 1.0
    assert score(str(a + b + 1), truth) == 0.0
    assert score(str(a + b)[::-1] + "0", truth) == 0.0


@pytest.mark.parametrize(
    "response",
    ["", " ", "\n", "4", "466", "046", "+46", "-46", "46.0", "46!", "the answer is 46", "4 6", "４６", "46 46"],
)
def test_a_malformed_answer_earns_nothing(response: str) -> None:
    assert score(response, "46") == 0.0


@pytest.mark.parametrize("response", ["46", " 46", "46\n", "\t46 "])
def test_white_space_around_an_answer_is_ignored(response: str) -> None:
    assert score(response, "46") == 1.0


def test_verl_finds_the_reward_function_by_its_package_path() -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path = "pkg://verl_m2po.tasks.arithmetic"
    config = OmegaConf.create({"reward": {"custom_reward_function": {"path": path, "name": "compute_score"}}})
    reward = get_custom_reward_fn(config)  # pyright: ignore[reportArgumentType]
    assert reward is not None
    # By keyword, as verl's reward managers call it.
    assert reward(data_source="arithmetic", solution_str="46", ground_truth="46", extra_info={"index": 0}) == 1.0


def test_rows_of_another_set_are_scored_by_verl() -> None:
    assert arithmetic.compute_score("openai/gsm8k", "So\n#### 46", "46") == 1.0
    with pytest.raises(NotImplementedError, match="no_such_set"):
        arithmetic.compute_score("no_such_set", "46", "46")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1, "split": "train"}, "index=-1"),
        ({"index": 0, "split": "test"}, "split='test' is not one of train, validation"),
        ({"index": 0, "split": "train", "digits": 0}, "digits=0 is not between 1 and 64"),
        ({"index": 0, "split": "train", "digits": 65}, "digits=65"),
        ({"index": 0, "split": "train", "seed": -1}, "seed=-1"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arithmetic.problem(**arguments)


def test_the_files_hold_the_rows(tmp_path) -> None:
    paths = arithmetic.write_parquet(tmp_path / "new", train_rows=30, validation_rows=7, digits=3, seed=5)
    assert {split: path.name for split, path in paths.items()} == {
        "train": "train.parquet",
        "validation": "validation.parquet",
    }
    for split, count in (("train", 30), ("validation", 7)):
        assert parquet.check(paths[split]) == count
        found = parquet.pq.read_table(paths[split]).to_pylist()
        assert found == list(arithmetic.rows(count, split=split, digits=3, seed=5))


@pytest.mark.parametrize("name", ["train_rows", "validation_rows"])
def test_an_empty_split_is_refused(tmp_path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        arithmetic.write_parquet(tmp_path, **{name: 0})
