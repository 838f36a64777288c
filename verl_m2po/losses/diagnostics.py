"""Statistics of importance ratios: sums that add up over micro-batches and ranks, and ratios formed once, at the end.

verl averages metrics over micro-batches without weights, which is wrong for ratios. So the losses leave sums with the
actor worker, which adds them up over the whole optimizer mini-batch. Where the actor worker is not ours, the sums
themselves are logged, and the ratio of two logged numbers is exact.
"""

import torch
from torch import Tensor

from verl_m2po.second_moment import TrustRegion, trust_region_magnitude
from verl_m2po.trust_region import MiniBatch, current_mini_batch

# Sums over the tokens of a micro-batch. The trust region is A > 0 and r > 1, or A < 0 and r < 1; counted tokens are
# response tokens with finite log ratio; kept ones have a gradient; the gain of a token is A r, 0 where it is not kept.
# In the order in which `token_pass.weigh` makes them.
TOKEN_SUMS = (
    "log_ratio",
    "magnitude_trust_region",
    "counted_tokens",
    "magnitude_kept_trust_region",
    "kept_ratio",
    "kept_tokens",
    "square",
    "square_trust_region",
    "counted_tokens_again",
    "square_kept_trust_region",
    "kept_ratio_square",
    "trust_region_tokens",
    "kept_trust_region_tokens",
    "gain",
    "gain_magnitude",
    "response_tokens",
)
DECISION_SUMS = ("micro_batches", "threshold_log_ratio")
ENTROPY_SUMS = ("entropy", "entropy_tokens", "entropy_masked", "entropy_masked_tokens")
# The entries of one vector of sums, as it travels.
SUMS = TOKEN_SUMS + DECISION_SUMS + ENTROPY_SUMS
PREFIX = "actor/m2po/"
# Losses that leave their sums themselves.
SELF_REPORTING = frozenset(
    {
        *("m2po", "m2po_clip", "no_trust_region"),
        *("bapo", "decoupled_loglinear", "mix_ppg", "oapl", "rec", "topr"),
    }
)


def token_sums(
    log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, keep: Tensor, derivative: Tensor
) -> Tensor:
    """`TOKEN_SUMS` of a micro-batch from whole tensors, for losses that are not one pass over the tokens.

    Args:
        log_ratio: log of current over behaviour policy, [batch, response], without gradient.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape.
        keep: bool, same shape; tokens that have a gradient.
        derivative: Derivative of the token's loss with respect to its log-prob, same shape; 0 where not kept.
    """
    counted = torch.isfinite(log_ratio) & response_mask
    log_ratio = torch.where(counted, log_ratio, 0.0).double()
    magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
    kept_magnitude = torch.where(keep, magnitude, 0.0)
    kept_ratio = torch.where(keep, log_ratio.clamp(max=20.0).exp(), 0.0)
    sums = (
        *(response_mask.sum(), counted.sum(), keep.sum()),
        *(torch.count_nonzero(magnitude), torch.count_nonzero(kept_magnitude)),
        *(log_ratio.sum(), log_ratio.square().sum(), magnitude.square().sum(), kept_magnitude.square().sum()),
        *(kept_ratio.sum(), kept_ratio.square().sum(), -derivative.sum(), derivative.abs().sum()),
    )
    return torch.stack([value.double() for value in sums])


def report(token_sums: Tensor, keep: Tensor, region: TrustRegion | None) -> dict[str, float]:
    """Leave the sums of a micro-batch with the actor worker; without one of ours, return them as metrics.

    Args:
        token_sums: float64, by the names of `TOKEN_SUMS`.
        keep: bool, [batch, response]; the response tokens that have a gradient.
        region: The decision, None for a loss without one.
    """
    mini_batch = current_mini_batch()
    if mini_batch is not None:
        leave(mini_batch, token_sums, keep, region)
        return {}
    named = zip(TOKEN_SUMS, token_sums.tolist(), strict=True)
    return {f"{PREFIX}micro_batch/{name}": value for name, value in named}


def leave(mini_batch: MiniBatch, token_sums: Tensor, keep: Tensor, region: TrustRegion | None) -> None:
    """Leave the sums of a micro-batch with the actor worker."""
    sums = token_sums.new_zeros(len(SUMS))
    sums[: len(TOKEN_SUMS)] = token_sums
    sums[SUMS.index("micro_batches")] = 1
    if region is not None:
        # Where nothing is dropped the threshold is inf, which would spoil an average.
        drops = torch.isfinite(region.threshold_log_ratio)
        sums[SUMS.index("threshold_log_ratio")] = torch.where(drops, region.threshold_log_ratio, region.largest_kept)
    mini_batch.sums.append(sums)
    mini_batch.keep = keep


def add_entropy(mini_batch: MiniBatch, entropy: Tensor, response_mask: Tensor) -> None:
    """Add the entropies of the micro-batch at hand, [batch, response], to the sums that its loss has left."""
    assert mini_batch.keep is not None
    masked = response_mask & ~mini_batch.keep
    total = torch.where(response_mask, entropy, 0.0).sum()
    total_masked = torch.where(masked, entropy, 0.0).sum()
    mini_batch.sums[-1][-len(ENTROPY_SUMS) :] = torch.stack((total, response_mask.sum(), total_masked, masked.sum()))


def ratios(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of a whole mini-batch from its sums, without their prefix.

    Args:
        sums: By the names of `SUMS`, over all micro-batches and ranks. Quotients without a denominator are 0.
    """
    response, counted, kept = sums["response_tokens"], sums["counted_tokens"], sums["kept_tokens"]
    inside, kept_inside = sums["trust_region_tokens"], sums["kept_trust_region_tokens"]
    positive = (sums["gain_magnitude"] + sums["gain"]) / 2
    metrics = {
        "second_moment_before": _share(sums["square_trust_region"], inside),
        "second_moment_after": _share(sums["square_kept_trust_region"], kept_inside),
        "second_moment_all": _share(sums["square"], counted),
        "threshold_log_ratio": _share(sums["threshold_log_ratio"], sums["micro_batches"]),
        "masked_fraction": _share(response - kept, response),
        "masked_fraction_trust_region": _share(inside - kept_inside, inside),
        "trust_region_fraction": _share(inside, response),
        "nonfinite_tokens": response - counted,
        "effective_sample_size": _share(sums["kept_ratio"] ** 2, kept * sums["kept_ratio_square"]),
        "gradient_share_positive": _share(positive, sums["gain_magnitude"]),
        "gradient_share_negative": _share(sums["gain_magnitude"] - positive, sums["gain_magnitude"]),
        "kl": _share(-sums["log_ratio"], counted),
    }
    if sums["entropy_tokens"]:
        masked = sums["entropy_masked_tokens"]
        metrics["entropy_masked"] = _share(sums["entropy_masked"], masked)
        metrics["entropy_kept"] = _share(sums["entropy"] - sums["entropy_masked"], sums["entropy_tokens"] - masked)
    return metrics


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
