"""The loss `ppo_ewma`: decoupled PPO whose proximal policy has an average of the weights of past updates.

See "Batch size-invariance for policy optimization" (arXiv:2110.00641) and openai/ppo-ewma. The average itself is the
actor worker's: `verl_m2po.actor.averaged`.
"""

from dataclasses import dataclass

import torch
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.decoupled import decoupled_tokens
from verl_m2po.losses.kernel.needs import BEHAVIOUR, Need
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_number
from verl_m2po.losses.kernel.tokens import Tokens

STRATEGY = "actor_rollout_ref.actor.strategy"


@dataclass
class PPOEWMAConfig(BaseConfig):
    """Settings of the loss `ppo_ewma`.

    Args:
        decay: Weight of the mean so far at each optimizer update, in [0, 1): the mean lags behind by
            decay / (1 - decay) updates. 0: the present weights, so that nothing is clipped.
        clip_low: Lower bound of the ratio of current over proximal policy is 1 - clip_low; 1 switches it off.
        clip_high: Upper bound is 1 + clip_high; inf switches it off.
        ratio_cap: Largest ratio of current over behaviour policy by which a token can weigh; inf switches it off.
    """

    decay: float = 0.889
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float = 100.0

    def __post_init__(self):
        check_number(self.decay, "ppo_ewma.decay", at_least=0)
        if self.decay >= 1:
            raise ValueError(f"{KEY}.ppo_ewma.decay must be below 1, got {self.decay}: the average would never move.")
        check_number(self.clip_low, "ppo_ewma.clip_low", at_least=0)
        check_number(self.clip_high, "ppo_ewma.clip_high", at_least=0)
        check_number(self.ratio_cap, "ppo_ewma.ratio_cap", above=1)


def ewma_tokens(tokens: Tokens, settings: PPOEWMAConfig) -> TokenLoss:
    """Decoupled PPO around the log-probs that the average of the weights gives; tokens without one have no loss."""
    assert tokens.averaged_log_prob is not None
    averaged = tokens.averaged_log_prob.to(tokens.log_ratio.dtype)
    is_known = tokens.mask & torch.isfinite(averaged)
    log_weight = (averaged - tokens.log_prob + tokens.log_ratio).masked_fill(~is_known, 0.0)
    found = decoupled_tokens(tokens, log_weight, settings)
    return TokenLoss(found.value.masked_fill(~is_known, 0.0), found.derivative, found.keep & is_known)


register(
    Loss(
        name="ppo_ewma",
        summary="Decoupled PPO whose proximal policy has an average of the weights of past updates",
        rule=ewma_tokens,
        settings=PPOEWMAConfig,
        needs=(*BEHAVIOUR, Need(STRATEGY, ("fsdp2", "fsdp"), "the weights are averaged with verl's FSDP engine alone")),
        presets=("ppo_ewma",),
        averaging_decay=lambda settings: settings.decay,
    )
)
