"""Statistics of importance ratios, as sums that add up over micro-batches and ranks; ratios are formed once, at the end.

verl averages metrics over micro-batches without weights, which is wrong for ratios. So the losses leave sums with the
actor worker, which adds them up over the whole optimizer mini-batch. Where the actor worker is not ours, the sums
themselves are logged, and the ratio of two logged numbers is exact.
"""

from typing import Any

import torch
from torch import Tensor

from verl_m2po.second_moment import TrustRegion
from verl_m2po.trust_region import current_mini_batch

# Names of the entries of a vector of sums. "T" is the trust region: A > 0 and r > 1, or A < 0 and r < 1.
SUMS = (
    "response_tokens",
    "nonfinite_tokens",
    "trust_region_tokens",
    "masked_tokens",
    "masked_trust_region_tokens",
    "log_ratio",
    "square",
    "square_trust_region",
    "square_kept_trust_region",
    "ratio",
    "ratio_square",
    "weight",
    "weight_magnitude",
)
PREFIX = "actor/m2po/"


def token_sums(log_ratio: Tensor, magnitude: Tensor, response_mask: Tensor, keep: Tensor, weighted: Tensor) -> Tensor:
    """One float64 vector of `SUMS` for a micro-batch, on the device of the tokens."""
    finite = torch.isfinite(log_ratio) & response_mask
    log_ratio = log_ratio.masked_fill(~finite, 0.0)
    ratio = log_ratio.clamp(-20, 20).exp().mul_(keep)
    kept = magnitude.masked_fill(~keep, 0.0)
    inside = torch.count_nonzero(magnitude)
    inside_kept = torch.count_nonzero(kept)
    response = response_mask.sum()
    return torch.stack(
        [
            response.double(),
            (response - finite.sum()).double(),
            inside.double(),
            (response - keep.sum()).double(),
            (inside - inside_kept).double(),
            log_ratio.sum().double(),
            log_ratio.square().sum().double(),
            magnitude.square().sum().double(),
            kept.square().sum().double(),
            ratio.sum().double(),
            ratio.square().sum().double(),
            weighted.sum().double(),
            weighted.abs().sum().double(),
        ]
    )


def report(
    log_ratio: Tensor,
    magnitude: Tensor,
    response_mask: Tensor,
    keep: Tensor,
    weighted: Tensor,
    region: TrustRegion,
) -> dict[str, Any]:
    """Leave the sums of a micro-batch with the actor worker; without one of ours, return them as metrics."""
    sums = token_sums(log_ratio, magnitude, response_mask, keep, weighted)
    mini_batch = current_mini_batch()
    if mini_batch is not None:
        mini_batch.sums.append(sums)
        mini_batch.keep = keep
        return {}
    return {f"{PREFIX}micro_batch/{name}": value for name, value in zip(SUMS, sums.tolist(), strict=True)}


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of a whole mini-batch from its sums, by the names of contract 6 without their prefix."""

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    response, inside = sums["response_tokens"], sums["trust_region_tokens"]
    finite = response - sums["nonfinite_tokens"]
    kept = response - sums["masked_tokens"]
    positive = (sums["weight_magnitude"] - sums["weight"]) / 2
    return {
        "second_moment_before": share(sums["square_trust_region"], inside),
        "second_moment_after": share(sums["square_kept_trust_region"], inside - sums["masked_trust_region_tokens"]),
        "second_moment_all": share(sums["square"], finite),
        "masked_fraction": share(sums["masked_tokens"], response),
        "masked_fraction_trust_region": share(sums["masked_trust_region_tokens"], inside),
        "trust_region_fraction": share(inside, response),
        "nonfinite_tokens": sums["nonfinite_tokens"],
        "effective_sample_size": share(sums["ratio"] ** 2, kept * sums["ratio_square"]),
        "gradient_share_positive": share(positive, sums["weight_magnitude"]),
        "gradient_share_negative": share(sums["weight_magnitude"] - positive, sums["weight_magnitude"]),
    }
