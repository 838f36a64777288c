# pyright: reportAttributeAccessIssue=false, reportAbstractUsage=false
# A mixin: what it uses beside verl's is the trainer's that it stands in front of.
"""What the modes on separate devices share: the rollout's servers get weights, and may die and be replaced."""

from collections.abc import Callable
from typing import Any

from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode

from verl_m2po.patches import verl as verl_patches
from verl_m2po.staleness.heal.healing import Healing
from verl_m2po.staleness.heal.lent import Lent
from verl_m2po.staleness.heal.pushing import GatedCheckpointManager
from verl_m2po.staleness.rollout.client import SpanRecordingClient
from verl_m2po.staleness.rollout.scoring import ServedCheck
from verl_m2po.staleness.watch.deadline import TimeLimits
from verl_m2po.staleness.watch.liveness import Watch


class OnOwnDevices(PPOTrainer):
    """A mixin before that of the staleness modes, and before verl's trainer on separate devices."""

    _limits: TimeLimits
    _watch: Watch
    _end_if_asked: Callable[..., bool]
    replay_buffer: Any
    global_steps: int

    def _setup(self) -> None:
        with verl_patches.quiet_separate_setup():
            super()._setup()
        self._served = ServedCheck.of(self.config, self.actor_rollout_wg, self.standalone_server_manager)
        manager, pushes = self.standalone_server_manager, self.standalone_checkpoint_manager
        self._healing = Healing.of(self.config, manager, pushes, self._watch)
        self.standalone_checkpoint_manager = self._healing.pushes
        if self._enable_hybrid_replicas:
            lent = self.llm_server_manager.get_replicas()
            self.checkpoint_manager = GatedCheckpointManager(self.checkpoint_manager, lent, Lent())

    @property
    def _is_lent(self) -> bool:
        """Whether the training devices generate at the moment."""
        return self.current_mode == HybridEngineMode.ROLLOUT

    def prepare_step(self) -> dict:
        """As verl's: while its devices are lent, the trainer waits for the share of a batch that it lends them for."""
        return super().prepare_step() | self._wait_for_sampleable_and_switch()

    def _tend_servers(self, version: int) -> None:
        # The weights are pushed from the training devices: while they are lent, who joins waits for the next push.
        if not self._is_lent:
            self._healing.tend(version, self._limits.push)

    def _quieten_rollout(self) -> None:
        if self._is_lent:
            self.switch_to_trainer()

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        self._served.before_update(batch)
        self._healing.held.before_update()
        return super()._update_actor(batch, metrics)

    def _consume_sync_metrics(self) -> dict:
        changes, metrics = self._healing.take_changes()
        self.replay_buffer.tell(changes)
        return super()._consume_sync_metrics() | self._served.take_metrics() | metrics

    def get_llm_client(self) -> SpanRecordingClient:
        return self.standalone_server_manager.get_client(client_cls=SpanRecordingClient, heals=self._healing.heals)

    def on_step_end(self) -> None:
        if not self._end_if_asked():
            self.replay_buffer.settle()
            self.replay_buffer.prefetch.look()
            with self._limits.push(self.global_steps):
                self._healing.push(super().on_step_end)
                self._served.after_push()
            self.replay_buffer.advance(self.global_steps)
