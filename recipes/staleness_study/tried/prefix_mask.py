"""M2PO with its mask on the ratios of prefixes: what the policies make of a response up to a token, not of the token.

The log ratio of a prefix of t tokens grows as the root of t where those of its tokens are independent, so it is divided
by that, and the threshold stays M2PO's.
"""

from torch import Tensor

from staleness_study.tried._groups import Tried
from staleness_study.tried._masked import masked
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens, at_most
from verl_m2po.second_moment import TrustRegion, trust_region_magnitude


def prefix_magnitude(tokens: Tokens, _settings: Tried) -> Tensor:
    """|log ratio of the prefix| / sqrt(its length) where it is a trust-region token by that ratio; 0 elsewhere."""
    scaled = tokens.log_ratio.cumsum(-1) / tokens.counted.cumsum(-1).clamp(min=1).sqrt()
    return trust_region_magnitude(scaled * tokens.counted, tokens.raw_advantages)


def prefix_mask_tokens(tokens: Tokens, settings: Tried, region: TrustRegion) -> TokenLoss:
    """-A r on the tokens whose prefixes Algorithm 1 keeps."""
    value = (tokens.advantages * tokens.importance_weight).neg_()
    return TokenLoss(
        value, value, at_most(prefix_magnitude(tokens, settings), region.threshold_log_ratio), region=region
    )


LOSS = masked(prefix_mask_tokens, "M2PO with its mask on the ratios of prefixes", prefix_magnitude)
