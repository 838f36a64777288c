"""VCPO's scaling of the optimizer step by the effective sample size of a mini-batch.

See "Stable Asynchrony: Variance-Controlled Off-Policy RL" (VCPO, arXiv:2602.17616) and mit-han-lab/vcpo. The step is
scaled and not the loss: Adam divides a common factor of the gradient out again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.settings import KEY, check_number
from verl_m2po.losses.kernel.tokens import Tokens

# The paper's power. Its option "linear" is 1.
SQUARE_ROOT = 0.5


@dataclass
class StepScaleConfig(BaseConfig):
    """VCPO's scaling of the optimizer step by the effective sample size of the mini-batch's responses, for any loss.

    Args:
        power: The learning rate of an update is multiplied by min(1, effective share / base_share)^power; the share is
            the effective sample size of the mini-batch's responses over their number. The paper: 0.5; 1 is its option
            "linear". null or 0 switches it off.
        base_share: Effective share of the responses from which on the step is whole, in (0, 1]. The paper: 1 (GSM8K,
            MATH) and 0.55 (AIME, multi-turn).
    """

    power: float | None = None
    base_share: float = 1.0

    def __post_init__(self):
        check_number(self.base_share, "step_scale.base_share")
        if self.power is not None:
            check_number(self.power, "step_scale.power")
        check_settings(self.base_share, self.exponent, f"{KEY}.step_scale")

    @property
    def exponent(self) -> float:
        """`power` as a number; 0 where it is off."""
        return 0.0 if self.power is None else self.power

    @property
    def is_on(self) -> bool:
        """Whether any step may be scaled."""
        return self.exponent != 0


def sequence_log_weight(tokens: Tokens) -> Tensor:
    """Sum of log ratios over each response; non-finite log ratios do not count.

    Args:
        tokens: Of a micro-batch, with their ratio to the behaviour policy.

    Returns:
        [batch], at least float32; -inf, no weight at all, where a row has no response token (padding).
    """
    return tokens.log_ratio.sum(-1).masked_fill(~tokens.response_mask.any(-1), -math.inf)


def effective_sample_share(log_weight: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """(sum w)^2 / (n sum w^2) over all responses of all ranks of `group`: 1 on-policy, 1/n if one response is all.

    A common factor of the weights changes nothing, so the largest is taken out and nothing overflows. Nor does it
    change anything if each response is on the same number of ranks, as under tensor parallelism.

    Args:
        log_weight: log w of each response of this rank, [responses]; -inf does not count as one. May be empty.
        group: Ranks that share the mini-batch; None: this process alone.

    Returns:
        A share in [1/n, 1]; 1 for no responses.
    """
    log_weight = log_weight.double()
    largest = log_weight.max() if log_weight.numel() else log_weight.new_tensor(-math.inf)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    weight = (log_weight - torch.where(largest == -math.inf, 0.0, largest)).exp()
    sums = torch.stack([weight.sum(), weight.square().sum(), (log_weight > -math.inf).sum(dtype=torch.float64)])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, square, count = sums.tolist()
    return total**2 / (count * square) if count else 1.0


def step_scale(effective_share: float, base_share: float = 1.0, power: float = SQUARE_ROOT) -> float:
    """min(1, share / base)^power, the factor of the learning rate for one optimizer step.

    Args:
        effective_share: Of `effective_sample_share`.
        base_share: Share from which on the step is not scaled, in (0, 1]; the paper: 1 (GSM8K, MATH) and 0.55 (AIME,
            multi-turn).
        power: 0.5 in the paper; 1 is its option "linear"; 0 switches the scaling off.

    Raises:
        ValueError: `base_share` outside (0, 1], or a negative power.
    """
    check_settings(base_share, power)
    return min(1.0, effective_share / base_share) ** power


def check_settings(base_share: float, power: float, key: str = "step_scale") -> None:
    """Raise unless `base_share` is in (0, 1] and `power` at least 0; `key` is what they are called in messages."""
    if not 0 < base_share <= 1:
        raise ValueError(f"{key}.base_share is a share of the responses and must be in (0, 1], got {base_share}.")
    if not 0 <= power < math.inf:
        raise ValueError(f"{key}.power must be a number >= 0 (the paper: 0.5), or null for none, got {power}.")


@contextmanager
def scaled_learning_rate(optimizer: Any, factor: float) -> Iterator[None]:
    """Multiply the learning rate of every parameter group of `optimizer` by `factor`, and put it back at the end.

    Args:
        optimizer: torch's, or Megatron's, whose `param_groups` are those of the optimizers inside it.
        factor: 1 changes nothing.
    """
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


@contextmanager
def scaled_by_effective_share(
    optimizer: Any, log_weight: Tensor, base_share: float, power: float, group: dist.ProcessGroup | None = None
) -> Iterator[dict[str, float]]:
    """Scale an optimizer step within by `step_scale` of `effective_sample_share`; yields both by their metrics' names.

    Args:
        optimizer: As for `scaled_learning_rate`.
        log_weight: Of the whole mini-batch on this rank, as for `effective_sample_share`.
        base_share: As for `step_scale`.
        power: As for `step_scale`.
        group: As for `effective_sample_share`.
    """
    share = effective_sample_share(log_weight, group)
    scale = step_scale(share, base_share, power)
    with scaled_learning_rate(optimizer, scale):
        yield {"sequence_effective_sample_size": share, "step_scale": scale}
