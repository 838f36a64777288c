"""M2PO's mask on tokens that are weighted with the ratio of their prefix: an unbiased gradient of what is kept."""

from staleness_study.tried._groups import LARGEST_LOG_WEIGHT, Tried
from staleness_study.tried._masked import masked
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens, at_most
from verl_m2po.second_moment import TrustRegion


def prefix_weight_tokens(tokens: Tokens, _settings: Tried, region: TrustRegion) -> TokenLoss:
    """-A w on the tokens that Algorithm 1 keeps; w is the ratio of the response up to and including the token."""
    weight = tokens.log_ratio.cumsum(-1).clamp(max=LARGEST_LOG_WEIGHT).exp()
    value = -tokens.advantages * weight
    return TokenLoss(value, value, at_most(tokens.magnitude, region.threshold_log_ratio), region=region)


LOSS = masked(prefix_weight_tokens, "M2PO's mask on tokens weighted with the ratio of their prefix")
