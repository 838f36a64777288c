"""Off-policy sequence masking (OPSM) of DeepSeek-V3.2, which every loss of this package honours.

A response with negative advantage that the current policy has moved away from gets no gradient.
"""

from dataclasses import dataclass

from torch import Tensor
from verl.base_config import BaseConfig
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.settings import KEY, check_number, settings_of
from verl_m2po.losses.kernel.tokens import Tokens

NAME = "opsm"


@dataclass
class OPSMConfig(BaseConfig):
    """Off-policy sequence masking, for every loss of this package; for others algorithm.policy_loss=opsm.

    Args:
        delta: Largest mean over a response of log(behaviour / current), in nats a token, at which a response with
            A < 0 keeps its gradient. null switches it off. The paper gives no value; slime's default is 1e-4,
            Trinity-RFT's 0.1, TRL's documentation shows 0.5.
        base: The registered loss under algorithm.policy_loss=opsm; without effect for any other loss.
    """

    delta: float | None = None
    base: str = "vanilla"

    def __post_init__(self):
        if self.delta is not None:
            check_number(self.delta, "opsm.delta", at_least=0)
        if self.base == NAME:
            raise ValueError(f"{KEY}.opsm.base must be another loss than {NAME} itself, for example vanilla.")


def sequence_keep_mask(log_ratio: Tensor, advantages: Tensor, mask: Tensor, delta: float) -> Tensor:
    """True where a token keeps its gradient: its advantage is not negative, or its response has not moved far.

    See DeepSeek-V3.2 (arXiv:2512.02556), and `compute_opsm_mask` in slime.

    Args:
        log_ratio: log of current over behaviour policy, finite on `mask`, [batch, response].
        advantages: Advantage of each token, same shape.
        mask: bool, same shape; response tokens. Other tokens do not count in the mean.
        delta: Largest mean of -log_ratio over a response that is still kept, nats a token; inf keeps all.

    Returns:
        bool, same shape.
    """
    tokens = mask.sum(-1, keepdim=True).clamp(min=1)
    moved = (-log_ratio).masked_fill(~mask, 0.0).sum(-1, keepdim=True) / tokens
    return ~((advantages < 0) & (moved > delta))


def sequences_kept(tokens: Tokens, config: ActorConfig) -> Tensor | None:
    """What `policy_loss.opsm.delta` leaves of `tokens`, bool [batch, response]; None: all, at no cost.

    Args:
        tokens: Of a micro-batch, with their ratio to the behaviour policy.
        config: verl's actor settings.
    """
    delta = settings_of(config, NAME, OPSMConfig).delta
    return None if delta is None else sequence_keep_mask(tokens.log_ratio, tokens.advantages, tokens.mask, delta)
