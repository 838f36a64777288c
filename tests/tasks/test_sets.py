"""How a ground truth is taken from what the sources publish."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.tasks import scoring, sets
from verl_m2po.tasks.sets import DATA_SETS, UnusableRow


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("9 * 2 = 18\n#### 18", "18"),
        ("#### -3", "-3"),
        ("#### 1,234", "1234"),
        ("#### $5", "5"),
        ("a #### 1 #### 2", "2"),
    ],
)
def test_what_follows_the_hashes(answer: str, truth: str) -> None:
    assert sets.after_hashes(answer) == truth


@pytest.mark.parametrize(
    ("answer", "reason"), [("18", "has no ####"), ("####", "not a number: ''"), ("#### two", "not a number: 'two'")]
)
def test_hashes_without_a_number(answer: str, reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        sets.after_hashes(answer)


def test_a_long_whole_number_keeps_every_digit() -> None:
    assert sets.whole_number("12345678901234567891") == "12345678901234567891"


@given(st.integers(-(10**9), 10**9))
def test_a_whole_number_in_any_form(number: int) -> None:
    for form in (number, float(number), str(number), f"{number}.0", f" {number} "):
        assert sets.whole_number(form) == str(number)
    assert sets.whole_number(f"{abs(number):012d}") == str(abs(number))


@pytest.mark.parametrize("answer", ["", "x", "1/2", "nan", "inf", 2.5])
def test_not_a_whole_number(answer: object) -> None:
    with pytest.raises(UnusableRow, match="number"):
        sets.whole_number(answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("$\\frac{1}{2}$", "\\frac{1}{2}"),
        ("$48$, $384$", "48, 384"),
        (["$1$", "2"], "1, 2"),
        ("\\$3.50", "\\$3.50"),
        (7, "7"),
    ],
)
def test_latex_loses_its_dollars(answer: object, truth: str) -> None:
    assert sets.latex(answer) == truth


@pytest.mark.parametrize("answer", ["", "$$", [], [None]])
def test_no_latex(answer: object) -> None:
    with pytest.raises(UnusableRow, match="the answer is empty"):
        sets.latex(answer)


def test_the_last_box_of_a_solution() -> None:
    assert sets.last_boxed("First \\boxed{1}, then $x=\\boxed{\\frac{1}{2}}$.") == "\\frac{1}{2}"
    with pytest.raises(UnusableRow, match="has no"):
        sets.last_boxed("It is 2.")


@pytest.mark.parametrize("data_set", DATA_SETS.values(), ids=lambda data_set: data_set.name)
def test_a_set_is_scored_by_verl(data_set: sets.DataSet) -> None:
    right, wrong = data_set.answered.format("12"), data_set.answered.format("13")
    assert scoring.is_right(data_set.data_source, right, "12")
    assert not scoring.is_right(data_set.data_source, wrong, "12")
    assert not scoring.is_right(data_set.data_source, "", "12")


def test_no_two_sets_share_a_metric() -> None:
    assert len({data_set.data_source for data_set in DATA_SETS.values()}) == len(DATA_SETS)


def test_math_verify_knows_equal_forms() -> None:
    assert scoring.compute_score("math_verify/x", "So \\boxed{0.5}.", "\\frac{1}{2}") == 1.0
    assert scoring.compute_score("math_verify/x", "So \\boxed{0.51}.", "\\frac{1}{2}") == 0.0


def test_an_unknown_source_is_not_scored_in_silence() -> None:
    with pytest.raises(NotImplementedError, match="amc23"):
        scoring.compute_score("amc23", "\\boxed{1}", "1")
