"""What a trainer mode needs of verl's configuration, and sets: for a run through verl and on the experiment bench."""

import logging
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_m2po.ground.verl_config import has_proximal_policy, trains_an_adapter
from verl_m2po.staleness.config import SEPARATE_MODES, BoundedAsyncConfig, SeparateConfig, load_mode_config, make_clock

logger = logging.getLogger(__name__)

_CHECKPOINT_ENGINE = "actor_rollout_ref.rollout.checkpoint_engine"

REBUILT_ENGINES = ("nccl", "kimi_ckpt_engine")
"""Checkpoint engines of verl's that keep a process group from push to push unless they are told otherwise."""

AGENT_LOOP_MANAGER = "verl_m2po.staleness.rollout.manager.StalenessAgentLoopManager"


def set_what_the_mode_needs(config: DictConfig) -> None:
    """Change verl's configuration, in place, to what makes the age of a rollout visible to the loss.

    The policy that generated the tokens must be in a ratio: the loss's own in bypass mode, or that of verl's weights
    where a proximal policy stands between. Generation must report weight versions and lots: our agent loop manager.
    What moves a bound must be measured, whatever the loss.
    """
    mode = config.trainer.v1.trainer_mode
    settings = load_mode_config(config, mode)
    needs: dict[str, Any] = {
        "algorithm.rollout_correction.bypass_mode": not has_proximal_policy(config),
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.agent.agent_loop_manager_class": AGENT_LOOP_MANAGER,
        # Read by the buffer that ours replaces.
        "trainer.v1.sampler.max_off_policy_threshold": None,
    }
    if mode in SEPARATE_MODES:
        # verl's separate trainer samples one mini-batch at a time, and reads the number under two names.
        mini_batches = make_clock(config).mini_batches_per_step
        needs[f"trainer.v1.{mode}.parameter_sync_step"] = mini_batches
        needs["trainer.v1.separate_async.parameter_sync_step"] = mini_batches
        if trains_an_adapter(config):
            # Unmerged, verl 0.9.1 sends the frozen base alone to a rollout with processes of its own (verl issue 7495).
            needs["actor_rollout_ref.model.lora.merge"] = True
    if isinstance(settings, SeparateConfig) and settings.heal:
        backend = OmegaConf.select(config, f"{_CHECKPOINT_ENGINE}.backend")
        if backend in REBUILT_ENGINES:
            # Otherwise the group of the first push is kept, and a push to other replicas than those fails.
            needs[f"{_CHECKPOINT_ENGINE}.engine_kwargs.{backend}.rebuild_group"] = True
    if isinstance(settings, BoundedAsyncConfig) and settings.adaptive.enable:
        needs["actor_rollout_ref.actor.policy_loss.diagnostics"] = True
    with open_dict(config):
        # Workers read the section; without the overlay it may be incomplete, or absent.
        config.trainer.v1[mode] = asdict(settings)
        for key, value in needs.items():
            if OmegaConf.select(config, key) != value:
                logger.info("trainer_mode=%s sets %s=%s", mode, key, value)
                OmegaConf.update(config, key, value, force_add=True)
