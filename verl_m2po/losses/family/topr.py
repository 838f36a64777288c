"""The loss `topr`: tapered off-policy REINFORCE.

See "Tapered Off-Policy REINFORCE" (arXiv:2503.14286).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.base_config import BaseConfig
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.settings import check_choice, settings_of
from verl_m2po.losses.kernel.token_loss import TokenLoss, Tokens, evaluate

LEVELS = ("sequence", "token", "geometric")


@dataclass
class TOPRConfig(BaseConfig):
    """Settings of the loss `topr`.

    Args:
        level: Ratio of current over behaviour policy that tapers negative tokens. "sequence": product over the
            response, as in the paper. "token": the token's own, as in ROLL's code. "geometric": geometric mean over the
            response, as in verl pull request 6986.
    """

    level: str = "sequence"

    def __post_init__(self):
        check_choice(self.level, LEVELS, "topr.level")


@register_policy_loss("topr")
def topr_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """-A log pi where A > 0, and -min(ratio, 1) A log pi elsewhere; the ratio is detached.

    Needs behaviour log-probs (`bypass_mode`). What is good is imitated however old it is; what is bad is pushed down
    only as far as the current policy would still say it.

    Args:
        old_log_prob: log-probs under the behaviour policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape.
        loss_agg_mode: verl's name of the aggregation.
        config: verl's actor settings; `policy_loss.topr` holds ours.
        rollout_is_weights: verl's rollout correction weights, multiplied onto each token; None: 1.

    Returns:
        The loss, and metrics where no actor worker of ours collects them.

    Raises:
        ValueError: Arguments do not fit each other.
    """
    settings = settings_of(config, "topr", TOPRConfig)
    return evaluate(
        lambda tokens: topr_tokens(tokens, settings),
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )


def topr_tokens(tokens: Tokens, settings: TOPRConfig) -> TokenLoss:
    """The rule of `topr`."""
    log_ratio = tokens.log_ratio
    if settings.level != "token":
        log_ratio = tokens.sequence_log_ratio()
    if settings.level == "geometric":
        log_ratio = log_ratio / tokens.lengths()
    taper = torch.where(tokens.advantages > 0, 1.0, log_ratio.clamp(max=0.0).exp())
    weighted = -taper * tokens.advantages
    return TokenLoss(weighted * tokens.log_prob, weighted, tokens.mask)
