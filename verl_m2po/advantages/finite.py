"""Refuse advantages that are not finite, before a batch is trained on."""

import math
from typing import Any

import torch
from tensordict import TensorDict

from verl_m2po.second_moment import on_host

KEY = "algorithm.adv_estimator"


def require_finite(data: TensorDict) -> None:
    """Raise unless all advantages of a batch are finite.

    One NaN makes the gradient of its mini-batch NaN, and verl then leaves that update out with a line in a worker's
    output; a loss that compares with the advantage drops the token and says nothing at all. Looked at once a trainer
    step, where the batch still lies in host memory: nothing waits for an accelerator.

    Args:
        data: A batch on its way to the actor; `advantages` is float [rows, response], padded or jagged. A batch without
            them, or on an accelerator, passes.

    Raises:
        ValueError: Some are NaN or infinite.
    """
    advantages: Any = data.get("advantages", None)
    if advantages is None or not on_host(advantages):
        return
    values = advantages.values() if advantages.is_nested else advantages
    # A finite sum needs no second pass over the tokens; a sum can also overflow.
    if math.isfinite(values.sum().item()):
        return
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {values.numel()} advantages are NaN or infinite ({KEY}). A reward, the KL penalty in the reward "
            "or the advantage estimator gave such a number: make the reward function (or reward model) return finite "
            "ones"
        )
