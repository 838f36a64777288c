"""The loss `no_trust_region`: plain importance weighting, the paper's prosperity-before-collapse baseline.

See "Prosperity before Collapse" (arXiv:2510.01161): without a trust region training on stale data first learns as
fast as on fresh data, then collapses.
"""

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.tokens import Tokens


def no_trust_region_tokens(tokens: Tokens, _settings: None) -> TokenLoss:
    """-A r on every response token with a finite log ratio, as `m2po` with an infinite threshold."""
    value = (tokens.advantages * tokens.importance_weight).neg_()
    return TokenLoss(value, value, tokens.mask)


register(
    Loss(
        name="no_trust_region",
        summary="Plain importance weighting, the baseline that prospers before it collapses",
        rule=no_trust_region_tokens,
        needs=BEHAVIOUR,
        presets=("no_trust_region",),
        masks_sequences_first=True,
    )
)
