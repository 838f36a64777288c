"""The objective of decoupled PPO around any proximal policy.

See "Batch size-invariance for policy optimization" (arXiv:2110.00641) and openai/ppo-ewma, `compute_losses`.
"""

from typing import Protocol

from torch import Tensor

from verl_m2po.losses.kernel.clipped import clipped_surrogate
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import LOG_RATIO_LIMIT, Tokens, importance_weight


class DecoupledSettings(Protocol):
    """Clip range and cap.

    Args:
        clip_low: Lower bound of the ratio of current over proximal policy is 1 - clip_low; 1 switches it off.
        clip_high: Upper bound is 1 + clip_high; inf switches it off.
        ratio_cap: Largest ratio of current over behaviour policy by which a token can weigh; inf switches it off.
    """

    clip_low: float
    clip_high: float
    ratio_cap: float


def decoupled_tokens(tokens: Tokens, log_weight: Tensor, settings: DecoupledSettings) -> TokenLoss:
    """w max(-A r, -A clip(r)) with r = current / proximal and w = proximal / behaviour, w detached.

    Args:
        tokens: The tokens of a micro-batch.
        log_weight: log(proximal / behaviour) of any proximal policy, [batch, response].
        settings: Clip range and cap.
    """
    ratio = tokens.importance_weight
    shrink = (settings.ratio_cap / ratio.clamp(min=1e-30)).clamp(max=1.0)
    proximal_ratio = (tokens.log_ratio - log_weight).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    value, keep = clipped_surrogate(proximal_ratio, tokens.advantages, 1 - settings.clip_low, 1 + settings.clip_high)
    weight = importance_weight(log_weight) * shrink
    return TokenLoss(weight * value, -tokens.advantages * ratio * shrink, keep)
