"""The loss `drpo`: importance weighting with a quadratic price for how far the probability of a token has moved.

See DRPO, "Rethinking the Divergence Regularization in LLM RL" (arXiv:2606.09821), and its code, Tencent-Hunyuan/UniRL:
DPPO's trust region on differences of probabilities, with a gradient that falls on its way to the border and turns back
beyond it, where DPPO's mask takes it away.
"""

from dataclasses import dataclass

from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.needs import BEHAVIOUR, NORM_BY_STD, Need
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_number
from verl_m2po.losses.kernel.tokens import Tokens


@dataclass
class DRPOConfig(BaseConfig):
    """Settings of the loss `drpo`.

    Args:
        delta: How far the probability of a token may move until its gradient is 0. The paper's 12.5 is no distance
            that a probability can go: with it weights lie between 1 - 0.08 and 1 + 0.08. inf: no trust region.
    """

    delta: float = 12.5

    def __post_init__(self):
        check_number(self.delta, "drpo.delta", above=0)


def drpo_tokens(tokens: Tokens, settings: DRPOConfig) -> TokenLoss:
    """-A r + |A| mu (r - 1)^2 / (2 delta), with mu the probability of the token under the behaviour policy.

    The gradient of REINFORCE with weights r, times 1 - sign(A) (pi - mu) / delta.
    """
    ratio, advantages = tokens.importance_weight, tokens.advantages
    probability = (tokens.log_prob - tokens.log_ratio).clamp(max=0).exp()
    moved = probability * (ratio - 1)
    price = advantages.abs() * moved * (ratio - 1) / (2 * settings.delta)
    derivative = (advantages.abs() * moved / settings.delta - advantages) * ratio
    return TokenLoss(price - advantages * ratio, derivative, tokens.mask)


register(
    Loss(
        name="drpo",
        summary="Importance weighting with a quadratic price for how far the probability of a token has moved",
        rule=drpo_tokens,
        settings=DRPOConfig,
        needs=(*BEHAVIOUR, Need(NORM_BY_STD, (False,), "its code subtracts the mean of the group and does not divide")),
        presets=("drpo",),
    )
)
