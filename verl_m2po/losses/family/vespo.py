"""The loss `vespo`: whole responses weighted by a gamma-shaped function of their importance ratio.

See VESPO (arXiv:2602.10693) and its code, FloyedShen/VESPO.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_number
from verl_m2po.losses.kernel.tokens import LOG_RATIO_LIMIT, Tokens

# As the code's: smaller rollout correction weights count as this.
SMALLEST_WEIGHT = 1e-8


@dataclass
class VESPOConfig(BaseConfig):
    """Settings of the loss `vespo`: the weight of a response is W^k exp(lambda (1 - W)), which is 1 at W = 1.

    The defaults are those that the released code and its scripts use; the docstring of that code says 2, 1.5, 4, 2.5.

    Args:
        k_positive: k of tokens with A >= 0: how fast the weight falls where W is below 1. 0 switches that off.
        lambda_positive: lambda of the same tokens: how fast it falls where W is large. 0 switches that off.
        k_negative: k of tokens with A < 0.
        lambda_negative: lambda of tokens with A < 0.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    def __post_init__(self):
        for name in ("k_positive", "lambda_positive", "k_negative", "lambda_negative"):
            check_number(getattr(self, name), f"vespo.{name}", at_least=0, below=1e6)


def vespo_tokens(tokens: Tokens, settings: VESPOConfig) -> TokenLoss:
    """-phi(W) A log pi, with phi(W) = W^k exp(lambda (1 - W)), detached.

    W is the product of the ratios of current over behaviour policy of the whole response, and of verl's rollout
    correction weights where there are any; its logarithm is cut off at 20 on both sides, as the code does.
    """
    log_w = tokens.sequence_log_ratio() + _log_correction(tokens)
    log_w = log_w.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    is_positive = tokens.advantages >= 0
    positive = _log_phi(log_w, settings.k_positive, settings.lambda_positive)
    negative = _log_phi(log_w, settings.k_negative, settings.lambda_negative)
    weighted = -torch.where(is_positive, positive, negative).exp() * tokens.advantages
    return TokenLoss(weighted * tokens.log_prob, weighted, tokens.mask)


def _log_phi(log_w: Tensor, k: float, decay: float) -> Tensor:
    return k * log_w + decay * (1 - log_w.exp())


def _log_correction(tokens: Tokens) -> Tensor | float:
    """log of the product of the rollout correction weights of each response, [batch, 1]."""
    weights = tokens.rollout_is_weights
    if weights is None:
        return 0.0
    return weights.clamp(min=SMALLEST_WEIGHT).log().where(tokens.mask, 0.0).sum(-1, keepdim=True)


register(
    Loss(
        name="vespo",
        summary="Weight whole responses by a gamma-shaped function of their importance ratio",
        rule=vespo_tokens,
        settings=VESPOConfig,
        needs=BEHAVIOUR,
        presets=("vespo",),
        weights_in_rule=True,
    )
)
