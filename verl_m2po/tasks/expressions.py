"""Expressions of whole numbers, and the plainest way to call a tool: a turn that is an expression is a call."""

import json
import re
from typing import Any

from verl.experimental.agent_loop.tool_parser import FunctionCall, ToolParser

MOST_CHARACTERS = 64
"""Of an expression; a longer one may be a number that takes for ever."""

_EXPRESSION = re.compile(r"\s*-?\d+(?:\s*[-+*]\s*\d+)*\s*")
_TERM = re.compile(r"([-+]?)((?:\d+\*)*\d+)")


def evaluate(expression: str) -> int:
    """The value of whole numbers joined by +, - and *.

    Raises:
        ValueError: it is no such expression, or longer than `MOST_CHARACTERS`.
    """
    if len(expression) > MOST_CHARACTERS or not _EXPRESSION.fullmatch(expression):
        raise ValueError(f"{expression[:MOST_CHARACTERS]!r} is no sum of whole numbers and their products")
    total = 0
    for sign, term in _TERM.findall("".join(expression.split())):
        product = 1
        for factor in term.split("*"):
            product *= int(factor)
        total += -product if sign == "-" else product
    return total


@ToolParser.register("expression")
class ExpressionParser(ToolParser):
    """A turn that is nothing but an expression calls the only tool with it; any other turn is the answer."""

    async def extract_tool_calls(
        self, responses_ids: list[int], tools: list[Any] | None = None
    ) -> tuple[str, list[FunctionCall]]:
        text = self.tokenizer.decode(responses_ids, skip_special_tokens=True)
        if not tools or not _EXPRESSION.fullmatch(text):
            return text, []
        arguments = json.dumps({"expression": text.strip()})
        return text, [FunctionCall(name=tools[0].function.name, arguments=arguments)]
