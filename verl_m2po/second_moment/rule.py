"""Algorithm 1 of M2PO in pure torch: which tokens keep their gradient.

See "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?" (arXiv:2510.01161). With r
the ratio of current over behaviour policy, the trust-region tokens are those with advantage A > 0 and r > 1, or A < 0
and r < 1. The paper removes the one with the largest (log r)^2 until the mean of the rest is at most the threshold.
"""

import torch
from torch import Tensor

from verl_m2po.second_moment.search import check_threshold, find_trust_region, on_host


def keep_mask(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, threshold: float) -> Tensor:
    """Which response tokens keep their gradient under Algorithm 1 of M2PO (arXiv:2510.01161).

    Args:
        log_ratio: log of current over behaviour policy, any shape, floating point, detached. Non-finite values are
            dropped and never influence what happens to the others.
        advantages: Same shape and dtype. Tokens with advantage 0 are outside the trust region, so they are kept.
        response_mask: Same shape, bool or 0/1. Tokens outside it are never kept and never counted.
        threshold: Largest allowed mean of (log r)^2 over the kept trust-region tokens. inf keeps every response
            token; 0 drops every trust-region token.

    Returns:
        bool, same shape: True where a response token is kept. Equal |log r| at the boundary stay or go together.

    Raises:
        ValueError: An argument does not fit, or the response mask is empty. On an accelerator an empty mask is not
            looked for, since reading it back would stall the accelerator.
        TypeError: An argument has the wrong type.
    """
    check_tokens("log_ratio", log_ratio, advantages=advantages, response_mask=response_mask)
    if advantages.dtype != log_ratio.dtype:
        raise TypeError(f"advantages has dtype {advantages.dtype}, but log_ratio has {log_ratio.dtype}.")
    check_threshold(threshold)
    if on_host(response_mask) and not bool(response_mask.any()):
        raise ValueError("response_mask selects no token, so there is nothing to take the second moment of.")
    magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
    region = find_trust_region([magnitude], threshold)
    return response_mask.bool() & torch.isfinite(log_ratio) & (magnitude <= region.threshold_log_ratio)


def trust_region_magnitude(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor | None = None) -> Tensor:
    """|log r| on trust-region tokens (A > 0 and r > 1, or A < 0 and r < 1), 0 on all others.

    Args:
        log_ratio: log of current over behaviour policy, any shape. Non-finite values count as outside the trust region.
        advantages: Same shape.
        response_mask: Same shape, bool or 0/1; None: all are response tokens, or their log ratios are 0.

    Returns:
        Same shape; float32, or float64 where `log_ratio` is. A new tensor.
    """
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    # sign(A) * log r is positive exactly on the trust region; a product A * log r could underflow to 0.
    magnitude = torch.sign(advantages).to(dtype).mul_(log_ratio).relu_()
    if response_mask is not None:
        magnitude.masked_fill_(~response_mask.bool(), 0.0)
    return magnitude.nan_to_num_(nan=0.0, posinf=0.0)


def check_tokens(name: str, reference: Tensor, **others: Tensor) -> None:
    """Raise unless all tensors describe the same tokens. No value is read, so an accelerator is not stalled.

    Args:
        name: Name of `reference` in an error.
        reference: Floating point, detached.
        others: Further tensors by their names in an error; same shape and device as `reference`, detached.
    """
    for other_name, tensor in {name: reference, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other_name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.requires_grad:
            raise ValueError(f"{other_name} requires grad, but nothing is differentiated by it: pass it detached.")
        if tensor.shape != reference.shape:
            raise ValueError(f"{other_name} has shape {tuple(tensor.shape)}, but {name} has {tuple(reference.shape)}.")
        if tensor.device != reference.device:
            raise ValueError(f"{other_name} is on {tensor.device}, but {name} is on {reference.device}.")
        if tensor.is_complex():
            raise TypeError(f"{other_name} must be real, got {tensor.dtype}.")
    if not reference.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {reference.dtype}.")
