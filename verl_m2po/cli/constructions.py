"""Builds what a run builds, without starting one: a name in a registry does not show that what it stands for works."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_m2po.plugin import Extension

# What verl's own config needs before it can be built, and nothing that writes or looks at earlier runs.
_RUN = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.actor.use_dynamic_bsz=true",
    "trainer.save_freq=-1",
    "trainer.resume_mode=disable",
)
_MODES = {
    "stale_k": ("staleness=s8",),
    "stale_k_separate": ("staleness=s8_separate", "hardware=eight_gpu_separate"),
    "bounded_async": ("staleness=bounded_async", "hardware=eight_gpu_separate"),
    "replay": ("staleness=replay", "replay=x4"),
}


def problems(extension: Extension) -> Iterator[str]:
    """Yield what of `extension` cannot be built, with the reason; nothing for a row that has no construction."""
    construct = _CONSTRUCTIONS.get(extension.what)
    if construct is None:
        return
    for name in extension.names:
        try:
            construct(name)
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            yield (
                f"{extension.what} {name!r} is registered, but cannot be built as a run does: {type(error).__name__}: "
                f"{reason[0].rstrip('.')}. Remedy: install the versions that it is tested with."
            )


def _compose(*overrides: str) -> DictConfig:
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from verl_m2po.ground.overrides import override

    GlobalHydra.instance().clear()
    with tempfile.TemporaryDirectory() as folder, initialize_config_module("verl.trainer.config", version_base=None):
        local = override("trainer.default_local_dir", folder)
        config = compose("ppo_trainer", overrides=[*_RUN, *overrides, local])
        OmegaConf.resolve(config)
        return config


def _call_loss(name: str) -> None:
    """Build the actor's settings with the loss `name`, by its preset if it has one, and take its gradient."""
    import torch
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    from verl_m2po.losses.kernel.mini_batch import MiniBatch, training

    has_preset = resources.files("verl_m2po.config").joinpath("loss", f"{name}.yaml").is_file()
    chosen = f"loss={name}" if has_preset else f"algorithm.policy_loss={name}"
    config = _compose(chosen)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(dp_size=1, batch_num_tokens=2, global_batch_size=2)
    old_log_prob = torch.tensor([[-1.0], [-2.0]])
    log_prob = (old_log_prob + 0.1).requires_grad_()
    policy_loss: Callable[..., Any] = get_policy_loss_fn(actor.policy_loss.loss_mode)
    # As our actor worker opens it for a mini-batch of one piece.
    with training(MiniBatch(decide_in_loss=True, averaged=deque([old_log_prob]))):
        loss, _metrics = policy_loss(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=torch.tensor([[1.0], [-1.0]]),
            response_mask=torch.ones(2, 1, dtype=torch.bool),
            loss_agg_mode=actor.loss_agg_mode,
            config=actor,
            # As verl's trainer makes them of a batch whose proximal policy is the behaviour policy.
            rollout_is_weights=torch.ones(2, 1) if config.algorithm.rollout_correction.rollout_is else None,
        )
    loss.backward()
    if log_prob.grad is None or not torch.isfinite(log_prob.grad).all():
        raise ValueError("its gradient on two tokens is not finite")


def _build_trainer(mode: str) -> None:
    """Build the trainer of `mode` as verl's main does, with its rule and its buffer; nothing is started."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    TRAINER_REGISTRY[mode](_compose("loss=m2po", *_MODES[mode]))


_CONSTRUCTIONS: dict[str, Callable[[str], None]] = {"policy loss": _call_loss, "trainer mode": _build_trainer}
