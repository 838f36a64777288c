"""A calculator for verl's tool agent loop, which loads this file in each of its workers.

actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent
actor_rollout_ref.rollout.multi_turn.function_tool_path=<this file>
actor_rollout_ref.rollout.multi_turn.format=expression
"""

from verl.tools.function_tool import function_tool

from verl_m2po.tasks.expressions import ExpressionParser, evaluate

__all__ = ["ExpressionParser", "calculator"]


@function_tool
def calculator(expression: str) -> str:
    """Calculates.

    Args:
        expression: Whole numbers joined by +, - and *.
    """
    return str(evaluate(expression))
