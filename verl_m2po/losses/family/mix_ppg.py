"""The loss `mix_ppg`: PPO's clip around the proximal policy of each token, as ReMix trains on old data.

See ReMix, "Squeeze the Soaked Sponge" (arXiv:2507.06892). ReMix's mix of old and new data is a matter of the trainer
mode, as are its KL-convex term and its reincarnation (`replay=remix_whole`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.losses.kernel.clipped import clipped_surrogate
from verl_m2po.losses.kernel.needs import BOTH_POLICIES, ROLLOUT_IS, ROLLOUT_IS_NORMALIZE, ROLLOUT_IS_THRESHOLD, Need
from verl_m2po.losses.kernel.record import Call, Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_number
from verl_m2po.losses.kernel.tokens import Tokens, importance_weight

# Weights below this can be truncated by verl without a word, and the clip would stand in the wrong place.
NO_TRUNCATION = 100.0


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


def mix_ppg_tokens(tokens: Tokens, settings: MixPPGConfig) -> TokenLoss:
    """max(-A r, -A clip(r, c - e, c + e)) with r = current / behaviour and c = proximal / behaviour.

    e is the setting `clip`. `old_log_probs` are the proximal policy's, and verl's token weights are c. Decoupled PPO
    clips to c (1 - e), c (1 + e) instead; with c = 1 both are PPO's clip.
    """
    centre = _centre(tokens)
    ratio = importance_weight(_behaviour_log_ratio(tokens)).where(centre > 0, 0.0)
    value, keep = clipped_surrogate(ratio, tokens.advantages, centre - settings.clip, centre + settings.clip)
    return TokenLoss(value, -tokens.advantages * ratio, keep)


def _centre(tokens: Tokens) -> Tensor:
    assert tokens.rollout_is_weights is not None, "refused before"
    return tokens.rollout_is_weights


def _behaviour_log_ratio(tokens: Tokens) -> Tensor:
    """log of current over behaviour policy; 0 for a token that verl's rollout correction has cut out."""
    centre = _centre(tokens)
    return (tokens.log_ratio + centre.clamp(min=1e-30).log()).where(centre > 0, 0.0)


def _has_weights(call: Call) -> None:
    if call.rollout_is_weights is None:
        raise ValueError(
            "The loss mix_ppg needs the ratio of proximal over behaviour policy: set "
            "algorithm.rollout_correction.rollout_is=token and algorithm.rollout_correction.bypass_mode=false."
        )


def _truncation(config: DictConfig) -> Iterator[Problem]:
    value = read(config, ROLLOUT_IS_THRESHOLD)
    try:
        is_high = float(value) >= NO_TRUNCATION and "_" not in str(value)
    except (TypeError, ValueError):
        is_high = False
    if not is_high:
        yield Problem(
            ROLLOUT_IS_THRESHOLD,
            value,
            "the loss mix_ppg would centre its clip on truncated weights",
            f"Set {ROLLOUT_IS_THRESHOLD}=1e6",
        )


register(
    Loss(
        name="mix_ppg",
        summary="PPO's clip around the proximal policy of each token, as ReMix trains on old data",
        rule=mix_ppg_tokens,
        settings=MixPPGConfig,
        needs=(
            *BOTH_POLICIES,
            Need(ROLLOUT_IS, ("token",), "the clip is centred on proximal over behaviour policy, token by token"),
            Need(ROLLOUT_IS_NORMALIZE, (False,), "normalised weights are not proximal over behaviour policy any more"),
        ),
        problems=_truncation,
        presets=("mix_ppg",),
        accepts=_has_weights,
        behaviour_log_ratio=_behaviour_log_ratio,
        weights_in_rule=True,
    )
)
