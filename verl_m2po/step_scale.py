"""VCPO's scaling of the optimizer step by the effective sample size of a mini-batch.

See "Stable Asynchrony: Variance-Controlled Off-Policy RL" (VCPO, arXiv:2602.17616) and mit-han-lab/vcpo. The step is
scaled and not the loss: Adam divides a common factor of the gradient out again.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

POWERS = {"sqrt": 0.5, "linear": 1.0}


def sequence_log_weight(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """Sum of log ratios over each response that has a token; non-finite log ratios do not count.

    Args:
        log_ratio: log of current over behaviour policy, [batch, response].
        response_mask: bool, same shape.

    Returns:
        [responses], at least float32.
    """
    finite = torch.isfinite(log_ratio) & response_mask
    dtype = torch.promote_types(log_ratio.dtype, torch.float32)
    sums = torch.where(finite, log_ratio, 0.0).to(dtype).sum(-1)
    return sums[response_mask.any(-1)]


def effective_sample_share(log_weight: Tensor, group: dist.ProcessGroup | None = None) -> float:
    """(sum w)^2 / (n sum w^2) over all responses of all ranks of `group`: 1 on-policy, 1/n if one response is all.

    A common factor of the weights changes nothing, so the largest is taken out and nothing overflows.

    Args:
        log_weight: log w of each response of this rank, [responses]; may be empty.
        group: Ranks that share the mini-batch; None: this process alone.

    Returns:
        A share in [1/n, 1]; 1 for no responses.
    """
    log_weight = log_weight.double()
    largest = log_weight.max() if log_weight.numel() else log_weight.new_tensor(-math.inf)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    weight = (log_weight - largest).exp()
    sums = torch.stack([weight.sum(), weight.square().sum(), weight.new_tensor(float(weight.numel()))])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, square, count = sums.tolist()
    return total**2 / (count * square) if count else 1.0


def step_scale(effective_share: float, base_share: float = 1.0, power: float = POWERS["sqrt"]) -> float:
    """min(1, share / base)^power, the factor of the learning rate for one optimizer step.

    Args:
        effective_share: Of `effective_sample_share`.
        base_share: Share from which on the step is not scaled, in (0, 1]; the paper: 1 (GSM8K, MATH) and 0.55 (AIME,
            multi-turn).
        power: 0.5 in the paper; 1 is its option "linear"; 0 switches the scaling off.

    Raises:
        ValueError: `base_share` outside (0, 1], or a negative power.
    """
    if not 0 < base_share <= 1:
        raise ValueError(f"The base of the effective sample share must be in (0, 1], got {base_share}.")
    if power < 0:
        raise ValueError(f"The power of the step scale must not be negative, got {power}.")
    return min(1.0, effective_share / base_share) ** power
