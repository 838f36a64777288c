"""Off-policy sequence masking (OPSM) of DeepSeek-V3.2, for any loss.

A response with negative advantage that the current policy has moved away from gets no gradient. Losses of this package
honour `policy_loss.opsm.delta` themselves (`token_loss.evaluate`). For verl's own losses, and any other registered one,
there is the loss `opsm`, which calls `policy_loss.opsm.base` with the masked responses cut off.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.base_config import BaseConfig
from verl.trainer.ppo.core_algos import get_policy_loss_fn, register_policy_loss
from verl.workers.config import ActorConfig

from verl_m2po.losses.kernel.settings import KEY, check_number, settings_of
from verl_m2po.losses.kernel.surrogate import detached_log_ratio
from verl_m2po.second_moment import check_tokens

NAME = "opsm"


@dataclass
class OPSMConfig(BaseConfig):
    """Settings of off-policy sequence masking.

    Args:
        delta: Largest mean over a response of log(behaviour / current), in nats a token, at which a response with
            negative advantage keeps its gradient. None: nothing is masked. The paper gives no value; slime's default is
            1e-4, Trinity-RFT's 0.1, TRL's documentation shows 0.5.
        base: The registered loss under the loss `opsm`; without effect for any other loss.
    """

    delta: float | None = None
    base: str = "vanilla"

    def __post_init__(self):
        if self.delta is not None:
            check_number(self.delta, "opsm.delta", at_least=0)
        if self.base == NAME:
            raise ValueError(f"{KEY}.opsm.base must be another loss than {NAME} itself, for example vanilla.")


def sequence_keep_mask(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, delta: float) -> Tensor:
    """True where a token keeps its gradient: its advantage is not negative, or its response has not moved far.

    See DeepSeek-V3.2 (arXiv:2512.02556), and `compute_opsm_mask` in slime.

    Args:
        log_ratio: log of current over behaviour policy, finite on response tokens, [batch, response].
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape. Other tokens do not count in the mean.
        delta: Largest mean of -log_ratio over a response that is still kept, nats a token; inf keeps all.

    Returns:
        bool, same shape.
    """
    tokens = response_mask.sum(-1, keepdim=True).clamp(min=1)
    moved = torch.where(response_mask, -log_ratio, 0.0).sum(-1, keepdim=True) / tokens
    return ~((advantages < 0) & (moved > delta))


def restrict(
    keep: Tensor, log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, config: ActorConfig | None
) -> Tensor:
    """`keep` without the responses that `policy_loss.opsm.delta` masks; the one place where our losses honour it.

    Args:
        keep: bool; the tokens to which a loss leaves a gradient, [batch, response].
        log_ratio: log of current over behaviour policy, same shape. Non-finite ones do not count.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape.
        config: verl's actor settings.
    """
    delta = settings_of(config, NAME, OPSMConfig).delta
    if delta is None:
        return keep
    finite = torch.isfinite(log_ratio) & response_mask
    return keep & sequence_keep_mask(log_ratio, advantages, finite, delta)


def trained_tokens(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, response_mask: Tensor, config: ActorConfig | None
) -> Tensor:
    """`response_mask` without the responses that `policy_loss.opsm.delta` masks, before any trust region is looked at.

    Arguments as verl gives them to a loss. Without a delta it is `response_mask` itself, at no cost.
    """
    if settings_of(config, NAME, OPSMConfig).delta is None:
        return response_mask
    log_ratio = detached_log_ratio(log_prob, old_log_prob)
    return restrict(response_mask.bool(), log_ratio, advantages, response_mask.bool(), config)


@register_policy_loss(NAME)
def opsm_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The loss `policy_loss.opsm.base`, without gradient from masked responses; the denominator stays.

    Masked tokens reach the base with advantage 0 and a log-prob that is cut from the graph. Their gradient is exactly 0
    whatever the base adds to its policy gradient. Their value is 0 too in every loss that is proportional to the
    advantage; a penalty on the log ratio (`dro`, `kl_cov`) keeps its value as a constant. A base that chooses tokens by
    a statistic of the batch (`clip_cov`, `kl_cov`) sees the advantages 0 in it.

    Args:
        old_log_prob: log-probs under the behaviour policy, [batch, response].
        log_prob: log-probs under the current policy, same shape.
        advantages: Advantage of each token, same shape.
        response_mask: bool, same shape.
        loss_agg_mode: verl's name of the aggregation, for the base.
        config: verl's actor settings; `policy_loss.opsm` holds ours.
        rollout_is_weights: verl's rollout correction weights, for the base.

    Returns:
        The loss, and the metrics of the base with the number of masked tokens.

    Raises:
        ValueError: `opsm.delta` is not set, or the base is not registered.
    """
    settings = settings_of(config, NAME, OPSMConfig)
    if settings.delta is None:
        raise ValueError(f"The loss {NAME} masks nothing without {KEY}.opsm.delta: set it, or select {settings.base}.")
    with torch.no_grad():
        log_ratio = detached_log_ratio(log_prob, old_log_prob)
        check_tokens("log_prob", log_ratio, advantages=advantages, response_mask=response_mask)
        finite = torch.isfinite(log_ratio) & response_mask
        keep = sequence_keep_mask(log_ratio, advantages, finite, settings.delta)
    base: Callable[..., Any] = get_policy_loss_fn(settings.base)
    loss, metrics = base(
        old_log_prob=old_log_prob,
        log_prob=torch.where(keep, log_prob, log_prob.detach()),
        advantages=torch.where(keep, advantages, 0.0),
        response_mask=response_mask,
        loss_agg_mode=loss_agg_mode,
        config=config,
        rollout_is_weights=rollout_is_weights,
    )
    masked = (response_mask & ~keep).sum().item()
    return loss, {**metrics, "actor/opsm/masked_tokens_per_micro_batch": float(masked)}
