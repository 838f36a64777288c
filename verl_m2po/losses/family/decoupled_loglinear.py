"""The loss `decoupled_loglinear`: decoupled PPO with an interpolated proximal policy, so without an extra forward pass.

See "Batch size-invariance for policy optimization" (arXiv:2110.00641) for the objective, and AReaL's documentation of
`prox_approx` for the interpolation. verl's own decoupled PPO computes the proximal policy instead:
`loss=decoupled_ppo`.
"""

from dataclasses import dataclass

from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.decoupled import decoupled_tokens
from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_number
from verl_m2po.losses.kernel.tokens import Tokens


@dataclass
class DecoupledLoglinearConfig(BaseConfig):
    """Settings of the loss `decoupled_loglinear`; exactly one of `alpha` and `staleness_updates` is set.

    Args:
        alpha: Where the proximal policy lies, in log-probs: 0 is the behaviour policy (PPO's clip), 1 the current one
            (no clip at all).
        staleness_updates: Age of the data in optimizer updates, s. The proximal policy is then the one of an update
            ago: alpha = (s - 1) / s. 0 and 1 are PPO's clip.
        clip_low: Lower bound of the ratio of current over proximal policy is 1 - clip_low; 1 switches it off.
        clip_high: Upper bound is 1 + clip_high; inf switches it off.
        ratio_cap: Largest ratio of current over behaviour policy by which a token can weigh; inf switches it off.
    """

    alpha: float | None = None
    staleness_updates: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float = 100.0

    def __post_init__(self):
        if self.alpha is not None:
            check_number(self.alpha, "decoupled_loglinear.alpha", at_least=0)
            if self.alpha > 1:
                raise ValueError(f"{KEY}.decoupled_loglinear.alpha must be at most 1, got {self.alpha}.")
        if self.staleness_updates is not None:
            check_number(self.staleness_updates, "decoupled_loglinear.staleness_updates", at_least=0)
        check_number(self.clip_low, "decoupled_loglinear.clip_low", at_least=0)
        check_number(self.clip_high, "decoupled_loglinear.clip_high", at_least=0)
        check_number(self.ratio_cap, "decoupled_loglinear.ratio_cap", above=1)

    def proximal_alpha(self) -> float:
        """The setting `alpha`, or (s - 1) / s where `staleness_updates`, s, is set instead."""
        if (self.alpha is None) == (self.staleness_updates is None):
            raise ValueError(
                f"Set exactly one of {KEY}.decoupled_loglinear.alpha and .staleness_updates, got {self.alpha} and "
                f"{self.staleness_updates}."
            )
        if self.alpha is not None:
            return self.alpha
        assert self.staleness_updates is not None
        age = max(self.staleness_updates, 1)
        return (age - 1) / age


def loglinear_tokens(tokens: Tokens, settings: DecoupledLoglinearConfig) -> TokenLoss:
    """Decoupled PPO with log proximal = log behaviour + alpha log(current / behaviour).

    Raises:
        ValueError: Not exactly one of `alpha` and `staleness_updates` is set.
    """
    return decoupled_tokens(tokens, settings.proximal_alpha() * tokens.log_ratio, settings)


register(
    Loss(
        name="decoupled_loglinear",
        summary="Decoupled PPO whose proximal policy is interpolated, without an extra forward pass",
        rule=loglinear_tokens,
        settings=DecoupledLoglinearConfig,
        needs=BEHAVIOUR,
        presets=("decoupled_loglinear",),
    )
)
