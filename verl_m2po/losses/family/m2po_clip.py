"""The loss `m2po_clip`: the form that the authors of M2PO released, which clips where the paper masks.

Written anew from the description of https://github.com/Infini-AI-Lab/M2PO. It bounds the second moment that remains
after clipping, so it takes the gradient from a superset of the tokens that Algorithm 1 drops.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Decision, Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_positive_threshold
from verl_m2po.losses.kernel.tokens import LOG_RATIO_LIMIT, Tokens, at_most
from verl_m2po.second_moment import TrustRegion


@dataclass
class M2POClipConfig(BaseConfig):
    """Settings of the loss `m2po_clip`.

    Args:
        threshold: Budget of the mean of (log r)^2 over trust-region tokens after clipping; 0.04 in the authors'
            scripts. inf switches the clip off.
    """

    threshold: float = 0.04

    def __post_init__(self):
        check_positive_threshold(self.threshold, f"{KEY}.m2po_clip.threshold")


def m2po_clip_tokens(tokens: Tokens, _settings: M2POClipConfig, region: TrustRegion) -> TokenLoss:
    """max(-A r, -A clip(r, exp(-tau), exp(tau))) with tau from the second moment of this micro-batch.

    As in the released code, each micro-batch decides for itself, the bounds have no floors (the option `miniclip` is
    off in every released script), and there is no dual clip. Unlike in the released code, the sign of A is taken token
    by token, no rounding slack is subtracted from tau, and tau = 0 is a value like any other.
    """
    advantages, tau = tokens.advantages, region.threshold_log_ratio
    derivative = -advantages * tokens.importance_weight
    bound = torch.exp(torch.sign(advantages) * tau.clamp(max=LOG_RATIO_LIMIT)).mul_(advantages).neg_()
    is_inside = at_most(tokens.magnitude, tau)
    value = torch.where(is_inside, derivative, bound)
    return TokenLoss(value, derivative, is_inside, region=region)


class _Search:
    """The bound of all tokens of a micro-batch."""

    def __init__(self, settings: M2POClipConfig, _floor: float):
        self._threshold = settings.threshold
        self._magnitudes: list[Tensor] = []

    def add(self, tokens: Tokens) -> None:
        self._magnitudes.append(tokens.magnitude.flatten())

    def solve(self, group: dist.ProcessGroup | None = None) -> TrustRegion:
        magnitude = torch.cat(self._magnitudes)
        tau = clip_bound(magnitude, self._threshold)
        return TrustRegion(tau, magnitude.amax() if magnitude.numel() else magnitude.new_zeros(()), tau)


def clip_bound(magnitude: Tensor, threshold: float) -> Tensor:
    """The bound tau on |log r| of the authors' code, 0-d; inf where the second moment is within the threshold.

    With the n squares of the trust region in ascending order, tau^2 is the last v_j before the first v_k for which
    v_1 + ... + v_k + (n - k) v_k, the sum after clipping at v_k, reaches the threshold times n; tau is 0 if v_k is the
    first square.

    Args:
        magnitude: |log r| on trust-region tokens, 0 elsewhere, any shape.
        threshold: Budget of the mean of (log r)^2.
    """
    if not magnitude.numel():
        return magnitude.new_full((), torch.inf)
    ascending = magnitude.flatten().sort().values
    squares = ascending.double().square()
    larger = torch.arange(squares.numel() - 1, -1, -1, device=squares.device)
    clipped_sums = squares.cumsum(0) + squares * larger
    # Tokens outside the trust region are zeros at the front: they add nothing, and are not counted in the budget.
    budget = threshold * torch.count_nonzero(magnitude)
    reaches = (clipped_sums >= budget) & (ascending > 0)
    first = torch.where(reaches.any(), reaches.int().argmax(), reaches.numel())
    before = torch.cat((ascending.new_zeros(1), ascending)).index_select(0, first.reshape(1)).squeeze(0)
    return torch.where(squares.sum() <= budget, torch.inf, before)


register(
    Loss(
        name="m2po_clip",
        summary="The authors' released code: clip at a bound from the second moment where the paper masks",
        rule=m2po_clip_tokens,
        settings=M2POClipConfig,
        decision=Decision(_Search),
        needs=BEHAVIOUR,
        presets=("m2po_clip",),
        masks_sequences_first=True,
    )
)
