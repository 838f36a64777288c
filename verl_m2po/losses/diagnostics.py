"""Statistics of importance ratios: sums that add up over micro-batches and ranks, and ratios formed once, at the end.

verl averages metrics over micro-batches without weights, which is wrong for ratios. So the losses leave sums with the
actor worker, which adds them up over the whole optimizer mini-batch. Where the actor worker is not ours, the sums
themselves are logged, and the ratio of two logged numbers is exact.
"""

from typing import Any

import torch
from torch import Tensor

from verl_m2po.losses.surrogate import importance_ratio, negative_weighted_advantage
from verl_m2po.second_moment import TrustRegion, trust_region_magnitude
from verl_m2po.trust_region import MiniBatch, current_mini_batch

# Names of the entries of a vector of sums. The trust region is A > 0 and r > 1, or A < 0 and r < 1. A masked token is
# one without gradient.
SUMS = (
    "micro_batches",
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
    "threshold_log_ratio",
    "entropy",
    "entropy_masked",
    "entropy_tokens",
    "entropy_masked_tokens",
)
_ENTROPY = SUMS.index("entropy")
PREFIX = "actor/m2po/"
# Losses that leave their sums themselves.
SELF_REPORTING = frozenset({"m2po", "m2po_clip", "no_trust_region"})


def report(
    log_ratio: Tensor,
    magnitude: Tensor,
    response_mask: Tensor,
    keep: Tensor,
    weighted: Tensor,
    region: TrustRegion | None,
) -> dict[str, Any]:
    """Leave the sums of a micro-batch with the actor worker; without one of ours, return them as metrics.

    Args:
        log_ratio: log of current over behaviour policy, [batch, response].
        magnitude: |log r| on trust-region tokens, 0 elsewhere.
        response_mask: bool; the response tokens.
        keep: bool; the response tokens that have a gradient.
        weighted: -A r on kept tokens, 0 elsewhere.
        region: The decision, None for a loss without one.
    """
    sums = token_sums(log_ratio, magnitude, response_mask, keep, weighted, region)
    mini_batch = current_mini_batch()
    if mini_batch is not None:
        mini_batch.sums.append(sums)
        mini_batch.keep = keep
        return {}
    values = sums[:_ENTROPY].tolist()
    return {f"{PREFIX}micro_batch/{name}": value for name, value in zip(SUMS, values, strict=False)}


def observe_any(mini_batch: MiniBatch, log_ratio: Tensor, advantages: Tensor, response_mask: Tensor) -> None:
    """Leave the sums of a micro-batch of a loss that knows nothing of this; all its finite tokens count as kept."""
    keep = torch.isfinite(log_ratio) & response_mask
    magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
    weighted = negative_weighted_advantage(log_ratio, advantages, keep, None)
    mini_batch.sums.append(token_sums(log_ratio, magnitude, response_mask, keep, weighted, None))
    mini_batch.keep = keep


def add_entropy(mini_batch: MiniBatch, entropy: Tensor, response_mask: Tensor) -> None:
    """Add the entropies of the micro-batch at hand, [batch, response], to the sums that its loss has left."""
    assert mini_batch.keep is not None
    masked = response_mask & ~mini_batch.keep
    kept_entropy = torch.where(mini_batch.keep, entropy, 0.0).sum()
    masked_entropy = torch.where(masked, entropy, 0.0).sum()
    columns = torch.stack([kept_entropy + masked_entropy, masked_entropy, response_mask.sum(), masked.sum()])
    mini_batch.sums[-1][_ENTROPY:] = columns


def token_sums(
    log_ratio: Tensor,
    magnitude: Tensor,
    response_mask: Tensor,
    keep: Tensor,
    weighted: Tensor,
    region: TrustRegion | None,
) -> Tensor:
    """One float64 vector of `SUMS` for a micro-batch, on the device of the tokens, without reading anything back."""
    finite = torch.isfinite(log_ratio) & response_mask
    log_ratio = torch.where(finite, log_ratio, 0.0)
    ratio = importance_ratio(log_ratio).mul_(keep)
    kept = torch.where(keep, magnitude, 0.0)
    tokens, tokens_finite, tokens_kept = response_mask.sum(), finite.sum(), keep.sum()
    inside, inside_kept = torch.count_nonzero(magnitude), torch.count_nonzero(kept)
    zero = tokens.new_zeros(())
    if region is None:
        threshold = zero
    else:
        # Where nothing is dropped the threshold is inf, which would spoil an average.
        threshold = torch.where(
            torch.isinf(region.threshold_log_ratio), region.largest_kept, region.threshold_log_ratio
        )
    values = [
        zero + 1,
        tokens,
        tokens - tokens_finite,
        inside,
        tokens - tokens_kept,
        inside - inside_kept,
        log_ratio.sum(),
        log_ratio.square().sum(),
        magnitude.square().sum(),
        kept.square().sum(),
        ratio.sum(),
        ratio.square().sum(),
        weighted.sum(),
        weighted.abs().sum(),
        threshold,
        *[zero] * (len(SUMS) - _ENTROPY),
    ]
    return torch.stack([value.to(torch.float64) for value in values])


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of a whole mini-batch from its sums, without their prefix.

    Args:
        sums: By the names of `SUMS`, over all micro-batches and ranks. Quotients without a denominator are 0.
    """
    finite = sums["response_tokens"] - sums["nonfinite_tokens"]
    kept = sums["response_tokens"] - sums["masked_tokens"]
    inside = sums["trust_region_tokens"]
    positive = (sums["weight_magnitude"] - sums["weight"]) / 2
    metrics = {
        "second_moment_before": _share(sums["square_trust_region"], inside),
        "second_moment_after": _share(sums["square_kept_trust_region"], inside - sums["masked_trust_region_tokens"]),
        "second_moment_all": _share(sums["square"], finite),
        "threshold_log_ratio": _share(sums["threshold_log_ratio"], sums["micro_batches"]),
        "masked_fraction": _share(sums["masked_tokens"], sums["response_tokens"]),
        "masked_fraction_trust_region": _share(sums["masked_trust_region_tokens"], inside),
        "trust_region_fraction": _share(inside, sums["response_tokens"]),
        "nonfinite_tokens": sums["nonfinite_tokens"],
        "effective_sample_size": _share(sums["ratio"] ** 2, kept * sums["ratio_square"]),
        "gradient_share_positive": _share(positive, sums["weight_magnitude"]),
        "gradient_share_negative": _share(sums["weight_magnitude"] - positive, sums["weight_magnitude"]),
        "kl": _share(-sums["log_ratio"], finite),
    }
    if sums["entropy_tokens"]:
        masked = sums["entropy_masked_tokens"]
        metrics["entropy_masked"] = _share(sums["entropy_masked"], masked)
        metrics["entropy_kept"] = _share(sums["entropy"] - sums["entropy_masked"], sums["entropy_tokens"] - masked)
    return metrics


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
