"""The loss `opsm`: off-policy sequence masking of DeepSeek-V3.2 around a loss that does not mask by itself.

Losses of this package honour `policy_loss.opsm.delta` themselves. For verl's own, and any other registered one, the
loss `opsm` calls the one named by `policy_loss.opsm.base` without gradient from the masked responses.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Call, Loss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.sequence_mask import NAME, OPSMConfig, sequences_kept
from verl_m2po.losses.kernel.settings import KEY
from verl_m2po.losses.kernel.tokens import tokens_of


def opsm_around(call: Call, settings: OPSMConfig) -> tuple[Tensor, dict[str, Any]]:
    """The loss `policy_loss.opsm.base`, without gradient from masked responses; the denominator stays.

    Masked tokens reach the base with advantage 0 and a log-prob that is cut from the graph. Their gradient is exactly 0
    whatever the base adds to its policy gradient. Their value is 0 too in every loss that is proportional to the
    advantage; a penalty on the log ratio (`dro`, `kl_cov`) keeps its value as a constant. A base that chooses tokens by
    a statistic of the batch (`clip_cov`, `kl_cov`) sees the advantages 0 of masked tokens in it. Tokens outside the
    response mask, and those without a finite log ratio, reach the base as zeros.

    Raises:
        ValueError: `opsm.delta` is not set, or the base is not registered.
    """
    if settings.delta is None:
        raise ValueError(f"The loss {NAME} masks nothing without {KEY}.opsm.delta: set it, or select {settings.base}.")
    weights = call.rollout_is_weights
    with torch.no_grad():
        tokens = tokens_of(call.log_prob, call.old_log_prob, call.advantages, call.response_mask, weights)
        left = sequences_kept(tokens, call.config)
        assert left is not None
        keep = tokens.mask & left
    base: Callable[..., Any] = get_policy_loss_fn(settings.base)
    loss, metrics = base(
        old_log_prob=torch.where(tokens.mask, call.old_log_prob, 0.0),
        log_prob=torch.where(keep, call.log_prob, torch.where(tokens.mask, call.log_prob.detach(), 0.0)),
        advantages=torch.where(keep, call.advantages, 0.0),
        response_mask=tokens.response_mask,
        loss_agg_mode=call.loss_agg_mode,
        config=call.config,
        rollout_is_weights=None if weights is None else torch.where(tokens.mask, weights, 0.0),
    )
    masked = (tokens.response_mask & ~left).sum().item()
    return loss, {**metrics, "actor/opsm/masked_tokens_per_micro_batch": float(masked)}


register(
    Loss(
        name=NAME,
        summary="Off-policy sequence masking around another loss, verl's PPO by default",
        around=opsm_around,
        settings=OPSMConfig,
        needs=BEHAVIOUR,
        presets=("opsm",),
    )
)
