"""M2PO's mask on TOPR's weights: successes count in full, failures by the ratio of their response, at most 1."""

import torch

from staleness_study.tried._groups import Tried
from staleness_study.tried._masked import masked
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens, at_most
from verl_m2po.second_moment import TrustRegion


def tapered_tokens(tokens: Tokens, _settings: Tried, region: TrustRegion) -> TokenLoss:
    """TOPR's loss on the tokens that Algorithm 1 keeps."""
    taper = tokens.sequence_log_ratio().clamp(max=0.0).exp()
    weighted = -torch.where(tokens.advantages > 0, 1.0, taper) * tokens.advantages
    keep = at_most(tokens.magnitude, region.threshold_log_ratio)
    return TokenLoss(weighted * tokens.log_prob, weighted, keep, region=region)


LOSS = masked(tapered_tokens, "M2PO's mask on TOPR's weights")
