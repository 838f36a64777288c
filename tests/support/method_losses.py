"""Call any registered policy loss on small tensors, the way verl's engines do."""

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

import verl_m2po.losses  # noqa: F401
from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.registry import LOSSES

# The shared test tensors of the method comparison.
LOG_PROB = [[-0.5, -1.0, -2.0], [-0.4, -1.5, -3.0]]
OLD_LOG_PROB = [[-0.7, -1.0, -1.2], [-0.9, -0.5, -3.0]]
PROXIMAL_LOG_PROB = [[-0.6, -1.0, -1.6], [-0.6, -1.0, -3.0]]
ADVANTAGES = [[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]]
MASK = [[1, 1, 1], [1, 1, 0]]

# Every loss of this family of methods, with settings with which it works on behaviour log-probs alone.
FAMILIES = {
    "rec": {},
    "oapl": {},
    "decoupled_loglinear": {"alpha": 0.5},
    "bapo": {"scope": "micro_batch"},
    "topr": {},
    "mix_ppg": {},
    "vespo": {},
    "ctpo": {},
    "drpo": {},
    "ppo_ewma": {},
}


def looked_ahead(name: str, averaged_log_prob: Tensor) -> AbstractContextManager:
    """What the actor worker has found before the loss `name` is called, where that asks for an average of weights."""
    loss = LOSSES.get(name)
    if loss is None or loss.averaging_decay is None:
        return nullcontext()
    return training(MiniBatch(averaged=deque([averaged_log_prob.detach()])))


def actor_config(loss_mode: str = "vanilla", actor: dict | None = None, **policy_loss) -> FSDPActorConfig:
    """verl's actor settings with `policy_loss` in them, PPO's clip at 0.2 without dual clip."""
    settings = {"clip_ratio_c": 1e30, **(actor or {})}
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_mini_batch_size=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=M2POPolicyLossConfig(loss_mode=loss_mode, **policy_loss),
        **settings,
    )


def shared_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {
        "old_log_prob": torch.tensor(OLD_LOG_PROB, dtype=dtype),
        "log_prob": torch.tensor(LOG_PROB, dtype=dtype),
        "advantages": torch.tensor(ADVANTAGES, dtype=dtype),
        "response_mask": torch.tensor(MASK).bool(),
    }


def evaluate(
    name: str,
    tensors: dict[str, Tensor] | None = None,
    settings: dict | None = None,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
    actor: dict | None = None,
    averaged_log_prob: Tensor | None = None,
    **policy_loss,
) -> tuple[Tensor, Tensor, dict]:
    """Loss, its gradient with respect to the log-probs, and the metrics of the loss registered as `name`.

    Of a loss around an average of weights: with the behaviour policy as that average, unless another one is given.
    """
    if settings is not None:
        policy_loss = {name: settings, **policy_loss}
    tensors = dict(tensors or shared_tensors())
    log_prob = tensors["log_prob"].clone().requires_grad_()
    if name == "mix_ppg" and rollout_is_weights is None:
        rollout_is_weights = torch.ones_like(log_prob)
    with looked_ahead(name, tensors["old_log_prob"] if averaged_log_prob is None else averaged_log_prob):
        loss, metrics = get_policy_loss_fn(name)(
            **{**tensors, "log_prob": log_prob},
            loss_agg_mode="seq-mean-token-sum" if name == "oapl" else loss_agg_mode,
            config=actor_config(name, actor, **policy_loss),
            rollout_is_weights=rollout_is_weights,
        )
    loss.backward()
    assert log_prob.grad is not None
    return loss.detach(), log_prob.grad, metrics


def random_tensors(seed: int, shape: tuple[int, int] = (6, 9), scale: float = 0.5) -> dict[str, Tensor]:
    """Responses of different length with one advantage each, log ratios of standard deviation `scale`, float64."""
    generator = torch.Generator().manual_seed(seed)
    batch, response = shape
    old_log_prob = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    log_ratio = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    lengths = torch.randint(0, response + 1, (batch, 1), generator=generator)
    return {
        "old_log_prob": old_log_prob,
        "log_prob": old_log_prob + log_ratio,
        "advantages": torch.randn((batch, 1), generator=generator, dtype=torch.float64).expand(shape).contiguous(),
        "response_mask": torch.arange(response) < lengths,
    }


def on_policy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "log_prob": tensors["old_log_prob"].clone()}


def reinforce_gradient(tensors: dict[str, Tensor]) -> Tensor:
    """Of -A log pi under the token mean."""
    mask = tensors["response_mask"]
    return torch.where(mask, -tensors["advantages"], 0.0) / mask.sum()
