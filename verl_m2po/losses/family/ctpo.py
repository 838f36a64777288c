"""The loss `ctpo`: PPO's clip on the ratio of the response so far, with bounds that widen along the response.

See CTPO, "Rethinking Importance Sampling in LLM Policy Optimization" (arXiv:2605.07331). The ratio is that of its code
(`cum-token-cumprod-la`), the bounds and their defaults those of its script. Which number a token has where a response
has tokens that are not trained (a tool's) could not be found; here only trained tokens are counted.
"""

from dataclasses import dataclass

import torch
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.clipped import clipped_surrogate
from verl_m2po.losses.kernel.needs import AGGREGATION, BEHAVIOUR, Need
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_number
from verl_m2po.losses.kernel.tokens import LOG_RATIO_LIMIT, Tokens

# As the code's: the log of the ratio of a prefix counts as this where it is larger.
LARGEST_LOG_RATIO = 10.0


@dataclass
class CTPOConfig(BaseConfig):
    """Settings of the loss `ctpo`: at the t-th token of a response, from 1, the log ratio of the prefix is clipped.

    Args:
        clip_low: It is clipped below -clip_low t^power; inf switches that off.
        clip_high: It is clipped above clip_high t^power; inf switches that off.
        dual_clip: Tokens with A < 0 lose their gradient above dual_clip t^power; inf switches that off.
        power: How the bounds widen: the sum of t independent log ratios grows as t^0.5. 0: the same bounds everywhere.
    """

    clip_low: float = 0.025
    clip_high: float = 0.05
    dual_clip: float = 0.05
    power: float = 0.5

    def __post_init__(self):
        for name in ("clip_low", "clip_high", "dual_clip", "power"):
            check_number(getattr(self, name), f"ctpo.{name}", at_least=0)


def ctpo_tokens(tokens: Tokens, settings: CTPOConfig) -> TokenLoss:
    """max(-A w, -A clip(w)), for A < 0 at most -A c; w is the ratio of the response up to and including the token.

    The gradient of w is that of its own token's log-prob alone, as the code has it.
    """
    log_ratio = tokens.log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.cumsum(-1).clamp(max=LARGEST_LOG_RATIO).exp()
    widening = tokens.counted.cumsum(-1).clamp(min=1).pow(settings.power)
    low, high, dual = (-settings.clip_low * widening, settings.clip_high * widening, settings.dual_clip * widening)
    value, keep = clipped_surrogate(ratio, tokens.advantages, low.exp(), high.exp())
    is_beyond = (tokens.advantages < 0) & (ratio > dual.exp())
    value = torch.where(is_beyond, -tokens.advantages * dual.exp(), value)
    return TokenLoss(value, -tokens.advantages * ratio, keep & ~is_beyond)


register(
    Loss(
        name="ctpo",
        summary="PPO's clip on the ratio of the response so far, with bounds that widen along the response",
        rule=ctpo_tokens,
        settings=CTPOConfig,
        needs=(
            *BEHAVIOUR,
            Need(AGGREGATION, ("seq-mean-token-mean",), "the paper averages the tokens of a response first"),
        ),
        presets=("ctpo",),
    )
)
