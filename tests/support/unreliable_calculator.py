"""The calculator, but that it is slow, raises or talks without end, by the value of the expression."""

import asyncio

from verl.tools.function_tool import function_tool

from verl_m2po.tasks.expressions import ExpressionParser, evaluate

__all__ = ["ExpressionParser", "unreliable_calculator"]


@function_tool
async def unreliable_calculator(expression: str) -> str:
    """Calculates.

    Args:
        expression: Whole numbers joined by +, - and *.
    """
    value = evaluate(expression)
    match value % 7:
        case 0:
            return "9" * 10_000
        case 1:
            raise ZeroDivisionError("in the calculator")
        case 2:
            await asyncio.sleep(0.2)
    return str(value)
