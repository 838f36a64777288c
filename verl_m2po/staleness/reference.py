# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# The mixin calls verl's trainer, which stands behind it.
"""The reference policy of the KL loss, as ReMix moves it (arXiv:2507.06892): two policies first, then another base.

*KL-convex*: beta [ s KL(pi || base) + (1 - s) KL(pi || precedent) ], whose share s falls during the run. The KL to the
(unnormalised) geometric mean base^s precedent^(1 - s) is just that sum. So verl's own KL loss stays, and only the
reference log-probs that it reads are mixed: s log base + (1 - s) log precedent. The precedent policy is the one with
the weights at the start of the trainer step, whose log-probs verl computes for a decoupled loss.

*Reincarnation*: after a given step the reference becomes the present policy, and the optimizer begins anew.
"""

import logging
import math
from pathlib import Path
from typing import Any

import ray
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_m2po.staleness.config import ReferenceConfig, ReplayModeConfig, load_mode_config
from verl_m2po.staleness.rows.ragged import Ragged

logger = logging.getLogger(__name__)

FOLDER = "reincarnated"
"""In `trainer.default_local_dir`: the weights of the reference, which verl's checkpoints do not have."""


def base_share(settings: ReferenceConfig, step: int) -> float:
    """The share s of the base model in trainer step `step`, from 1."""
    if reincarnates_before(settings, step):
        return 1.0
    falls = math.ceil(max(step - settings.constant_steps, 0) / settings.fall_every_steps)
    return max(1.0 - settings.share_fall * falls, settings.least_base_share)


def reincarnates_before(settings: ReferenceConfig, step: int) -> bool:
    """Whether training has begun anew by the time at which trainer step `step` begins."""
    after = settings.reincarnate_after_steps
    return after is not None and step > after


def mixed(batch: KVBatchMeta, share: float) -> KVBatchMeta:
    """`batch`, whose reference log-probs are those of the geometric mean of base and precedent policy."""
    assert batch.partition_id is not None
    fields = ["ref_log_prob", "old_log_probs"]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    base, precedent = (Ragged.of(data[name]) for name in fields)
    log_probs = share * base.values + (1 - share) * precedent.values
    columns = TensorDict({"ref_log_prob": base.with_values(log_probs).nested()}, batch_size=len(batch.keys))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=columns)


class MovingReference:
    """A trainer whose reference moves as its settings say. A mixin before verl's trainer."""

    config: Any
    global_steps: int
    actor_rollout_wg: Any
    role_worker_mapping: dict[Any, Any]

    def __init__(self, config: DictConfig) -> None:
        settings = load_mode_config(config, config.trainer.v1.trainer_mode)
        assert isinstance(settings, ReplayModeConfig)
        self.reference = settings.reference
        super().__init__(config)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.reference.reincarnate_after_steps is None:
            return
        # Not above: the trainer's file imports this one while verl itself is being imported.
        from verl.trainer.ppo.utils import Role

        from verl_m2po.staleness.reincarnation import ReincarnatingWorker

        for role in {Role.ActorRolloutRef, Role.ActorRollout} & self.role_worker_mapping.keys():
            self.role_worker_mapping[role] = ray.remote(ReincarnatingWorker)

    @property
    def _folder(self) -> str:
        return str(Path(self.config.trainer.default_local_dir).absolute() / FOLDER)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        after = self.reference.reincarnate_after_steps
        if after is not None and self.global_steps > after:
            self.actor_rollout_wg.load_reference(self._folder)

    def on_step_begin(self) -> None:
        """As verl's; the step after the given one begins with another reference and a new optimizer."""
        super().on_step_begin()
        if self.reference.reincarnate_after_steps == self.global_steps - 1:
            logger.info(
                "the reference becomes the policy after step %d, the optimizer begins anew", self.global_steps - 1
            )
            self.actor_rollout_wg.reincarnate(self._folder)

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        batch = super()._compute_ref_log_prob(batch, metrics)
        metrics["actor/kl_base_share"] = share = base_share(self.reference, self.global_steps)
        return batch if share == 1 else mixed(batch, share)
