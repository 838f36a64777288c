"""The loss `mix_ppg`: PPO's clip around the proximal policy of each token, as ReMix trains on old data.

See ReMix, "Squeeze the Soaked Sponge" (arXiv:2507.06892). Its mix of old and new data is a matter of the trainer mode;
its KL-convex term and its policy reincarnation are not part of this package.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from verl.base_config import BaseConfig
from verl.trainer.ppo.core_algos import register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.clipped import clipped_surrogate
from verl_m2po.losses.kernel.settings import check_number, settings_of
from verl_m2po.losses.kernel.token_loss import TokenLoss, Tokens, evaluate, importance_weight


@dataclass
class MixPPGConfig(BaseConfig):
    """Settings of the loss `mix_ppg`.

    Args:
        clip: Half width of the range of current over behaviour policy around proximal over behaviour policy; inf
            switches it off.
    """

    clip: float = 0.2

    def __post_init__(self):
        check_number(self.clip, "mix_ppg.clip", at_least=0)


@register_policy_loss("mix_ppg")
def mix_ppg_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """max(-A r, -A clip(r, c - e, c + e)) with r = current / behaviour and c = proximal / behaviour.

    Needs both policies: `bypass_mode=false`, `rollout_is=token`, and a `rollout_is_threshold` that truncates nothing.
    Decoupled PPO clips to c (1 - e), c (1 + e) instead; with c = 1 both are PPO's clip.

    Args:
        old_log_prob: log-probs under the proximal policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape.
        loss_agg_mode: verl's name of the aggregation.
        config: verl's actor settings; `policy_loss.mix_ppg` holds ours.
        rollout_is_weights: c of each token, same shape.

    Returns:
        The loss, and metrics where no actor worker of ours collects them.

    Raises:
        ValueError: Without `rollout_is_weights`, or arguments that do not fit each other.
    """
    if rollout_is_weights is None:
        raise ValueError(
            "The loss mix_ppg needs the ratio of proximal over behaviour policy: set "
            "algorithm.rollout_correction.rollout_is=token and algorithm.rollout_correction.bypass_mode=false."
        )
    settings = settings_of(config, "mix_ppg", MixPPGConfig)
    return evaluate(
        lambda tokens: mix_ppg_tokens(tokens, settings),
        old_log_prob,
        log_prob,
        advantages,
        response_mask,
        loss_agg_mode,
        config,
        rollout_is_weights,
        weights_in_rule=True,
    )


def mix_ppg_tokens(tokens: Tokens, settings: MixPPGConfig) -> TokenLoss:
    """The rule of `mix_ppg`."""
    assert tokens.rollout_is_weights is not None
    centre = tokens.rollout_is_weights.to(tokens.log_ratio.dtype)
    # A token with c = 0 was cut out by verl's rollout correction; its r is 0 too.
    log_ratio = (tokens.log_ratio + centre.clamp(min=1e-30).log()).where(centre > 0, 0.0)
    ratio = importance_weight(log_ratio).where(centre > 0, 0.0)
    value, keep = clipped_surrogate(ratio, tokens.advantages, centre - settings.clip, centre + settings.clip)
    return TokenLoss(value, -tokens.advantages * ratio, keep, log_ratio)
