"""M2PO's decision over tokens that are not quite M2PO's."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from staleness_study.tried._groups import Tried
from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Decision, Loss, TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens
from verl_m2po.second_moment import TrustRegion, TrustRegionSearch


def masked(
    rule: Callable[..., TokenLoss], summary: str, magnitude: Callable[[Tokens, Tried], Tensor] | None = None
) -> Loss:
    """The loss of `rule`, by the name of its module; not registered.

    Args:
        rule: (tokens, settings, trust region) to the loss of each token.
        summary: One line.
        magnitude: (tokens, settings) to what the search bounds the second moment of; None: M2PO's |log r|.
    """

    class Search:
        def __init__(self, settings: Tried, _floor: float):
            self._settings, self._search = settings, TrustRegionSearch(settings.threshold)

        def add(self, tokens: Tokens) -> None:
            self._search.add(tokens.magnitude if magnitude is None else magnitude(tokens, self._settings))

        def solve(self, group: dist.ProcessGroup | None = None) -> Any:
            found: TrustRegion = self._search.solve(group)
            return found

    name = rule.__module__.rpartition(".")[2]
    return Loss(name, summary, rule, settings=Tried, decision=Decision(Search), needs=BEHAVIOUR)
