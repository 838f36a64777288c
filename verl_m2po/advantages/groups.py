"""Rewards by prompt: what all group-relative advantage estimators share."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

# An estimator for one group: rewards [n] and what names the group, to advantages [n].
GroupRule = Callable[[Tensor, Hashable], Tensor]

Settings = TypeVar("Settings")


def group_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Sequence[Hashable], rule: GroupRule
) -> tuple[Tensor, Tensor]:
    """Advantages of outcome rewards, group by group, spread over the tokens of each response.

    Args:
        token_level_rewards: Sums over a response to its reward, [batch, response].
        response_mask: Tokens of the response, same shape.
        index: What names the group of each row (verl: the uid of its prompt), [batch].
        rule: The estimator.

    Returns:
        Advantages and returns, the same tensor, in the shape of `token_level_rewards`.
    """
    if index is None or len(index) != len(token_level_rewards):
        raise ValueError(
            f"Group advantages need the group of each of the {len(token_level_rewards)} responses, got "
            f"{'none' if index is None else len(index)}."
        )
    with torch.no_grad():
        rewards = token_level_rewards.sum(-1)
        rows: dict[Hashable, list[int]] = defaultdict(list)
        for row, group in enumerate(index):
            rows[group].append(row)
        advantages = torch.empty_like(rewards)
        for group, members in rows.items():
            advantages[members] = rule(rewards[members], group)
        spread = advantages.unsqueeze(-1) * response_mask
    return spread, spread


def zero_if_equal(advantages: Tensor, rewards: Tensor) -> Tensor:
    """`advantages` of one group, and exactly 0 where all its rewards are equal and finite; both [n].

    Rounding would leave 1e-7 of either sign there, and who asks for the sign of an advantage, or whether there is one,
    would take it for a real one: the trust region, sequence masking, and replay of informative groups.
    """
    # The difference of two infinite rewards is NaN: those are for `require_finite`.
    return advantages.masked_fill((rewards - rewards[:1] == 0).all(), 0.0)


def settings_of(config: Any, name: str, settings_class: type[Settings]) -> Settings:
    """`algorithm.<name>` as verl hands the config of the algorithm to an estimator; what is not set has its default."""
    section = None if config is None else config.get(name, None)
    if section is None:
        return settings_class()
    default: Any = settings_class()
    given = {name: section.get(name, None) for name in dataclasses.asdict(default)}
    return dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
