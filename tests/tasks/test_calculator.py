"""The calculator is Python's, for what it takes, and a call is a turn that is an expression."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.tasks.calculator import calculator
from verl_m2po.tasks.expressions import MOST_CHARACTERS, ExpressionParser, evaluate

numbers = st.integers(0, 999).map(str)


@given(numbers, st.lists(st.tuples(st.sampled_from(["+", "-", "*", " + ", "- "]), numbers), max_size=6))
def test_it_calculates_as_python_does(first, rest):
    expression = first + "".join(operator + number for operator, number in rest)
    assert evaluate(expression) == eval(expression)


@pytest.mark.parametrize("no_expression", ["", "1+", "2**9", "import os", "1" * (MOST_CHARACTERS + 1), "1/0", "(1)"])
def test_what_is_no_expression_is_refused(no_expression):
    with pytest.raises(ValueError, match="is no sum of whole numbers"):
        evaluate(no_expression)


@pytest.mark.parametrize(
    ("text", "called_with"),
    [("12+34", '{"expression": "12+34"}'), (" 46\n", '{"expression": "46"}'), ("It is 46", None)],
)
def test_a_turn_that_is_an_expression_is_a_call(text, called_with):
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: text)
    content, calls = asyncio.run(ExpressionParser(tokenizer).extract_tool_calls([1], [calculator_schema()]))
    assert content == text
    assert [call.arguments for call in calls] == ([called_with] if called_with else [])
    assert not asyncio.run(ExpressionParser(tokenizer).extract_tool_calls([1], []))[1], (
        "without a tool nothing is called"
    )


def calculator_schema():
    from verl.tools.function_tool import get_function_tool

    assert calculator
    return get_function_tool("calculator").tool_schema
