"""The loss `oapl`: regress the log ratio of a response onto the KL-optimal advantage.

See OAPL (arXiv:2602.19362), Eq. 2 and 3; the estimator of its advantage is `verl_m2po.advantages.oapl`.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.base_config import BaseConfig
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.settings import check_number, settings_of
from verl_m2po.losses.kernel.token_loss import TokenLoss, Tokens, evaluate

AGGREGATION = "seq-mean-token-sum"


@dataclass
class OAPLConfig(BaseConfig):
    """Settings of the loss `oapl`.

    Args:
        beta2: Factor of the log ratio, in units of reward per nat. Larger holds the policy closer to the behaviour
            policy.
        unit_gradient: Divide the loss by 2 beta2, so that its gradient starts as large as that of REINFORCE and verl's
            usual gradient clip means the same. false: the paper's scale, whose gradient clip is 1e-3.
    """

    beta2: float = 1e-3
    unit_gradient: bool = False

    def __post_init__(self):
        check_number(self.beta2, "oapl.beta2", above=0)


@register_policy_loss("oapl")
def oapl_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """(beta2 D - A)^2 averaged over responses, D the sum of log ratios of a response.

    Needs behaviour log-probs (`bypass_mode`), the advantage estimator `oapl`, and "seq-mean-token-sum". There is no
    ratio and no clip. A group whose rewards are all equal has advantage 0 and still pulls D to 0, so do not filter it.

    Args:
        old_log_prob: log-probs under the behaviour policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Reward minus soft value of the prompt, the same for all tokens of a response, same shape.
        response_mask: bool, same shape.
        loss_agg_mode: Must be "seq-mean-token-sum", the mean over responses.
        config: verl's actor settings; `policy_loss.oapl` holds ours.
        rollout_is_weights: verl's rollout correction weights, multiplied onto each token; None: 1.

    Returns:
        The loss, and metrics where no actor worker of ours collects them.

    Raises:
        ValueError: Another aggregation, or arguments that do not fit each other.
    """
    if loss_agg_mode != AGGREGATION:
        raise ValueError(
            f"The loss oapl is a mean over responses: set actor_rollout_ref.actor.loss_agg_mode={AGGREGATION} "
            f"(it is {loss_agg_mode})."
        )
    settings = settings_of(config, "oapl", OAPLConfig)
    return evaluate(
        lambda tokens: oapl_tokens(tokens, settings),
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
    )


def oapl_tokens(tokens: Tokens, settings: OAPLConfig) -> TokenLoss:
    """The rule of `oapl`: each token carries its share of the response's loss, and the whole of its derivative."""
    scale = 1 / (2 * settings.beta2) if settings.unit_gradient else 1.0
    lengths = tokens.lengths()
    advantage = tokens.advantages.where(tokens.mask, 0.0).sum(-1, keepdim=True) / lengths
    residual = (settings.beta2 * tokens.sequence_log_ratio() - advantage).expand_as(tokens.log_ratio)
    return TokenLoss(scale * residual.square() / lengths, 2 * scale * settings.beta2 * residual, tokens.mask)
