"""The loss `rec`: group-relative REINFORCE as an off-policy algorithm, with its clip masks, weights and regularisers.

See "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm" (arXiv:2509.24203) and the loss `rec` of Trinity-RFT.
"""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.ground.verl_config import read
from verl_m2po.losses.kernel.needs import AGGREGATION, BEHAVIOUR, ESTIMATOR, NORM_BY_STD, Need
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_choice, check_number
from verl_m2po.losses.kernel.tokens import Tokens, importance_weight

CLIPS = ("none", "one_side", "two_side", "ring", "gspo_one_side")
WEIGHTS = ("none", "importance_sampling", "gspo_importance_sampling", "advantage")
REGULARIZERS = ("none", "k2", "forward_kl")


@dataclass
class RECConfig(BaseConfig):
    """Settings of the loss `rec`; the defaults are REC-OneSide-NoIS.

    Args:
        clip: Which tokens keep their policy gradient. "none": all. "one_side": those that PPO's clip keeps.
            "two_side": those with r inside the range, whatever the sign of A. "ring": as two_side, and those that move
            back from beyond the outer range. "gspo_one_side": as one_side with the response's geometric mean ratio.
        weight: Detached factor of -A log pi. "none": 1. "importance_sampling": r. "gspo_importance_sampling": the
            response's geometric mean ratio. "advantage": exp(A / temperature), which is RED-Weight.
        regularizer: Added on every token. "none". "k2": coefficient x (log r)^2. "forward_kl": -coefficient x log pi.
        clip_low: Lower bound of r is 1 - clip_low; 1 switches it off.
        clip_high: Upper bound of r is 1 + clip_high; inf switches it off.
        outer_clip_low: For "ring": tokens with A >= 0 and r <= 1 - outer_clip_low keep their gradient too.
        outer_clip_high: For "ring": tokens with A <= 0 and r >= 1 + outer_clip_high keep their gradient too.
        coefficient: Of the regulariser; 0 switches it off. Kimi's OPMD with temperature tau is k2 with tau / 2.
        temperature: Of the weight "advantage", in units of reward; inf makes it 1.
    """

    clip: str = "one_side"
    weight: str = "none"
    regularizer: str = "none"
    clip_low: float = 0.2
    clip_high: float = 0.2
    outer_clip_low: float = 0.6
    outer_clip_high: float = 2.0
    coefficient: float = 0.1
    temperature: float = 1.0

    def __post_init__(self):
        check_choice(self.clip, CLIPS, "rec.clip")
        check_choice(self.weight, WEIGHTS, "rec.weight")
        check_choice(self.regularizer, REGULARIZERS, "rec.regularizer")
        for name in ("clip_low", "clip_high", "outer_clip_low", "outer_clip_high", "coefficient"):
            check_number(getattr(self, name), f"rec.{name}", at_least=0)
        check_number(self.temperature, "rec.temperature", above=0)
        if self.clip == "ring":
            check_number(self.outer_clip_low, "rec.outer_clip_low", at_least=self.clip_low)
            check_number(self.outer_clip_high, "rec.outer_clip_high", at_least=self.clip_high)


# The members that the paper and its code name. Kimi's OPMD: tau 0.1.
MEMBERS = {
    "reinforce": RECConfig(clip="none"),
    "rec_one_side_no_is": RECConfig(),
    "rec_one_side_is": RECConfig(weight="importance_sampling"),
    "rec_two_side_is": RECConfig(clip="two_side", weight="importance_sampling"),
    "rec_ring_no_is": RECConfig(clip="ring"),
    "rec_gspo_is": RECConfig(clip="gspo_one_side", weight="gspo_importance_sampling", clip_low=3e-4, clip_high=4e-4),
    "rec_gspo_no_is": RECConfig(clip="gspo_one_side", clip_low=3e-4, clip_high=4e-4),
    "opmd": RECConfig(clip="none", regularizer="k2", coefficient=0.05),
    "forward_kl": RECConfig(clip="none", regularizer="forward_kl"),
}


def rec_tokens(tokens: Tokens, settings: RECConfig) -> TokenLoss:
    """-w A log pi on the tokens that the clip keeps, plus a regulariser on all; weight w and clip are detached.

    pi is the current policy's probability of the token. A is reward minus group mean, not divided by a standard
    deviation. The one_side clip with importance sampling has the gradient of PPO's clip; the kinds of clip and weight
    after GSPO are meant for the loss aggregation "seq-mean-token-mean".
    """
    keep = _kept(tokens, settings)
    weighted = torch.where(keep, -_weight(tokens, settings) * tokens.advantages, 0.0)
    value, derivative = weighted * tokens.log_prob, weighted
    if settings.regularizer == "k2":
        value = value + settings.coefficient * tokens.log_ratio.square()
        derivative = derivative + 2 * settings.coefficient * tokens.log_ratio
    elif settings.regularizer == "forward_kl":
        value = value - settings.coefficient * tokens.log_prob
        derivative = derivative - settings.coefficient
    return TokenLoss(value, derivative, keep if settings.regularizer == "none" else tokens.mask)


def _kept(tokens: Tokens, settings: RECConfig) -> Tensor:
    if settings.clip == "none":
        return tokens.mask
    log_ratio = _geometric_mean(tokens) if settings.clip == "gspo_one_side" else tokens.log_ratio
    ratio, advantages = log_ratio.exp(), tokens.advantages
    is_below_high, is_above_low = ratio <= 1 + settings.clip_high, ratio >= 1 - settings.clip_low
    if settings.clip in ("one_side", "gspo_one_side"):
        return (is_below_high & (advantages >= 0)) | (is_above_low & (advantages <= 0))
    keep = is_below_high & is_above_low
    if settings.clip == "ring":
        returns_from_below = (advantages >= 0) & (ratio <= 1 - settings.outer_clip_low)
        returns_from_above = (advantages <= 0) & (ratio >= 1 + settings.outer_clip_high)
        keep = keep | returns_from_below | returns_from_above
    return keep


def _weight(tokens: Tokens, settings: RECConfig) -> Tensor | float:
    if settings.weight == "importance_sampling":
        return tokens.importance_weight
    if settings.weight == "gspo_importance_sampling":
        return importance_weight(_geometric_mean(tokens))
    if settings.weight == "advantage":
        return (tokens.advantages / settings.temperature).exp()
    return 1.0


def _geometric_mean(tokens: Tokens) -> Tensor:
    """log of the geometric mean of r over each response, [batch, 1]."""
    return tokens.sequence_log_ratio() / tokens.lengths()


def _divides_by_std(config: DictConfig) -> bool:
    rec = read(config, f"{KEY}.rec")
    # One-side REC with importance sampling and normalised advantages is GRPO: allowed, since it says what it is.
    is_grpo = rec is not None and rec.clip == "one_side" and rec.weight == "importance_sampling"
    return read(config, ESTIMATOR) == "grpo" and not is_grpo


def _is_gspo(config: DictConfig) -> bool:
    return read(config, f"{KEY}.rec.clip") == "gspo_one_side"


register(
    Loss(
        name="rec",
        summary="Group-relative REINFORCE off-policy: clip masks, weights and regularisers, one of each",
        rule=rec_tokens,
        settings=RECConfig,
        needs=(
            *BEHAVIOUR,
            Need(
                NORM_BY_STD,
                (False,),
                "REC takes reward minus group mean, not divided by a standard deviation",
                _divides_by_std,
            ),
            Need(AGGREGATION, ("seq-mean-token-mean",), "a clip of whole responses averages over responses", _is_gspo),
        ),
        presets=(
            *("rec", "rec_one_side_is", "rec_two_side_is", "rec_ring_no_is", "rec_gspo_is", "rec_gspo_no_is"),
            *("reinforce", "opmd", "asymre", "red_drop", "red_weight", "max_at_k"),
        ),
    )
)
