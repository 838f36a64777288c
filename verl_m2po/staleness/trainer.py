# pyright: reportAbstractUsage=false, reportArgumentType=false, reportUnusedCoroutine=false, reportReturnType=false, reportAttributeAccessIssue=false
# verl's trainer hands over untyped data, and its agent loop manager turns coroutines into plain calls at run time.
"""The trainer modes `stale_k`, `stale_k_separate` and `bounded_async`: verl's trainers with our buffer.

Importing this module registers them. verl's hooks decide when the rule is asked:

    prepare_step      nothing: the buffer starts groups itself, as many as the rule admits
    sample            waits for the batch, checks it row by row
    on_sample_begin   stale_k: waits until the present weights have generated their whole batch
    on_step_end       separate modes: waits until nothing in flight would be spoiled, pushes the weights, starts groups
                      asked to end: saves instead, and lets fit() return
    _save_checkpoint  waits likewise, then writes verl's checkpoint and the state of the buffer, whole or not at all
"""

import logging
from typing import Any

import psutil
import ray
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils import tensordict_utils as tu

from verl_m2po.ground import logs

# As a module: where the buffer is imported first, verl imports this file before the buffer has its class.
from verl_m2po.staleness import buffer, checks
from verl_m2po.staleness.account.bound import move_bound
from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.account.summary import print_summary
from verl_m2po.staleness.ages import with_ages
from verl_m2po.staleness.build_rule import build_rule
from verl_m2po.staleness.config import StaleKConfig, heals, load_mode_config, make_clock
from verl_m2po.staleness.dynamic_sampling import DynamicSampling, informative_window, most_in_flight
from verl_m2po.staleness.heal import reward_workers
from verl_m2po.staleness.heal.poisoned import PoisonedPrompts
from verl_m2po.staleness.needs import set_what_the_mode_needs
from verl_m2po.staleness.outcomes import judge
from verl_m2po.staleness.prompts import indices, require_a_batch
from verl_m2po.staleness.reference import MovingReference
from verl_m2po.staleness.restart import resume, shared_folder
from verl_m2po.staleness.restart.persistence import Persistence
from verl_m2po.staleness.restart.trainer_state import TrainerState
from verl_m2po.staleness.rollout.client import SpanRecordingClient
from verl_m2po.staleness.rollout.reports import WorkerReports
from verl_m2po.staleness.rows.store import LOT_FIELD, lot_partition
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import Ticket
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateCount
from verl_m2po.staleness.separate import OnOwnDevices
from verl_m2po.staleness.watch.deadline import TimeLimits
from verl_m2po.staleness.watch.liveness import Watch
from verl_m2po.staleness.watch.progress import Progress
from verl_m2po.staleness.watch.stop import STEP, StopRequest, StopRequested, put
from verl_m2po.staleness.watch.stopping import Stopping
from verl_m2po.staleness.watch.supervision import watch_storage, watch_workers

logger = logging.getLogger(__name__)


class _StalenessTrainer(PPOTrainer):
    """What the modes share: verl's hooks, each a line or two to the object that does it. A mixin before verl's."""

    replay_buffer: "buffer.StalenessReplayBuffer"

    def __init__(self, config: DictConfig) -> None:
        logs.follow_verl()
        checks.require_sound(checks.check(config, available_memory_bytes=psutil.virtual_memory().total))
        self._persistence = Persistence.open(config)
        checks.require_sound([*self._persistence.problems(resume.ranks_of(config)), *shared_folder.problems(config)])
        set_what_the_mode_needs(config)
        mode = config.trainer.v1.trainer_mode
        settings = load_mode_config(config, mode)
        self._stopping = Stopping(StopRequest(settings.stop_wait_s), lambda: self._persistence.saved_step)
        self._watch = Watch()
        self._limits = TimeLimits(self._watch, mode, settings)
        self._progress = Progress(settings.no_progress_timeout_s, f"trainer.v1.{mode}.no_progress_timeout_s")
        self._updates = UpdateCount(make_clock(config))
        self._sampling = DynamicSampling.of(config)
        self._informative = informative_window(self._sampling, self._updates.clock.train_batch_size)
        self._state = TrainerState(self, self._updates, self._informative)
        super().__init__(config)

    def init(self) -> None:
        """As verl's; ends in an error if a process of the run dies meanwhile."""
        watch_storage(self._watch)
        with self._watch.guard(), self._limits.start(), reward_workers.ours(heals(self.config)):
            super().init()

    def on_init_end(self) -> None:
        """As verl's, which pushes the first weights, and would wait for ever for a rollout server that died."""
        watch_workers(self._watch, self)
        with self._limits.push(self.global_steps):
            super().on_init_end()

    def fit(self, agent_loop_manager: Any) -> None:
        """As verl's; ends in an error if a process of the run dies, and after a checkpoint if it is asked to end."""
        self._watch.add("agent loop worker", agent_loop_manager.agent_loop_workers)
        # Where the driver could not, since this process is on another machine.
        logs.keep_earlier(logs.path_of(self.config))
        with self._watch.guard():
            # Without a limit: a worker that still imports is not blocked, however short generation_timeout_s is.
            ray.get([worker.__ray_ready__.remote() for worker in agent_loop_manager.agent_loop_workers])
            try:
                super().fit(agent_loop_manager)
            except StopRequested as stop:
                self._shutdown_dump_executor()
                self._leave_step(stop)

    def _make_rule(self, settings: StaleKConfig) -> StalenessRule:
        clock, seed = self._updates.clock, self.config.data.get("seed")
        return build_rule(settings, clock, seed, self._updates, most_in_flight(self._sampling, clock.train_batch_size))

    def _build_replay_buffer(self) -> "buffer.StalenessReplayBuffer":
        settings = load_mode_config(self.config, self.trainer_mode)
        ledger = TrainedRowsLedger.of(self.config, self._updates)
        poisoned = PoisonedPrompts.of(self.config)
        listeners = (poisoned, ledger, self._persistence.journal, self._informative, self._progress)
        return buffer.StalenessReplayBuffer(
            rule=self._make_rule(settings),
            metrics=StalenessMetrics(self._updates.clock, self._updates),
            failures=FailureWindow(settings.max_failed_fraction, settings.failed_window_groups),
            listeners=[each for each in listeners if each is not None],
            dispatch=self._add_prompts_to_generate,
            stop=self._stopping.request,
            tend=self._tend_servers,
            poisoned=poisoned,
            trainer_mode=self.trainer_mode,
            trainer_config=self.config.trainer.v1[self.trainer_mode],
            prefetch=settings.prefetch,
        )

    def _tend_servers(self, version: int) -> None:
        """The trainer waits, and the rollout holds weight `version`."""

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        prompts, rule = len(self.train_dataset), self.replay_buffer.rule
        require_a_batch(prompts, self.config.data.train_batch_size)
        steps = checks.planned_steps(self.config, prompts)
        checks.require_sound(checks.too_short(self.config, steps))
        rule.limit(steps)

    def on_train_begin(self) -> None:
        # Below verl's dump of the configuration and what the servers say when they start.
        print_summary(self.config)
        self.replay_buffer.tell(events.Began())
        self._stopping.request.announce_training()
        self._progress.begin(self.replay_buffer.rule.in_flight_tickets)
        self._watch.end_at(self._progress.standstill)
        # Instead of verl's warm-up batches: the rule admits the ramp.
        self.replay_buffer.pump()

    def prepare_step(self) -> dict:
        return {}

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self._generate(self.replay_buffer.open_groups(list(batch["uid"]), indices(batch), batch), batch)
        return len(batch)

    def _draw_prompts(self, count: int) -> tuple[list[int | str], TensorDict]:
        """The next `count` prompts of the data set, with their names."""
        batch = self._next_train_batch(count)
        return indices(batch), batch

    def _generate(self, tickets: list[Ticket], drawn: TensorDict) -> None:
        tickets, prompts = self.replay_buffer.without_poisoned(tickets, drawn)
        if prompts is None:
            return
        # The step that starts from the present weights. It may be one ahead of verl's counter at the end of a step.
        tu.assign_non_tensor_data(prompts, "global_steps", self.replay_buffer.version + 1)
        prompts[LOT_FIELD] = NonTensorStack(*[lot_partition(ticket.lot) for ticket in tickets])
        self.agent_loop_manager.generate_sequences(prompts)

    def _reissue_inflight_prompts(self, partition_id: str = "train") -> int:
        # verl calls this once, when the agent loop workers are there and before the first step.
        manager = self.agent_loop_manager
        reports = WorkerReports(manager.agent_loop_workers, manager.answer_timeout_s, manager)
        manager.connect(self._watch)
        reports.depend_on(self._watch.actors())
        self.replay_buffer.connect(reports, self._generate)
        self._persistence.journal_with(reports.journal_to)
        tickets, prompts = self.replay_buffer.reopen_groups()
        if prompts is not None:
            self._generate(tickets, prompts)
            logger.info("generating %d groups again that were in flight at the checkpoint", len(tickets))
        return len(tickets)

    def on_sample_end(self) -> None:
        self._stopping.begin(self.global_steps)
        put(STEP, self.global_steps)
        super().on_sample_end()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's, and the age of each row for the actor worker, which measures the mismatch floor at age zero."""
        batch = super()._compute_advantage(batch, metrics)
        batch = with_ages(batch, self._updates, self.global_steps)
        # What the batch shows of its groups may decide which of them are trained again.
        return judge(batch, self.replay_buffer.rule, self.replay_buffer.replayed, self.global_steps)

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's; counts the updates, and refuses those that would make an exact age another one."""
        clock, rows = self._updates.clock, len(batch.keys)
        made = clock.updates_of_rows(rows, self.config.actor_rollout_ref.rollout.n)
        configured = clock.updates_per_step // self.parameter_sync_step
        self.replay_buffer.rule.check_updates(self.global_steps, rows, made, configured)
        self.replay_buffer.prefetch.look()  # until the workers are done this process has nothing else to do
        batch = super()._update_actor(batch, metrics)
        self._updates.add(self.global_steps, made)
        return batch

    def _consume_sync_metrics(self) -> dict:
        return super()._consume_sync_metrics() | self.replay_buffer.step_metrics()

    def _validate(self) -> dict[str, float]:
        with self._progress.paused():
            metrics = self._stopping.validate(self.global_steps, super()._validate, self._end_validating_if_asked)
        self.agent_loop_manager.end_validation()
        return metrics

    def _end_validating_if_asked(self) -> bool:
        return self._end_if_asked(self._save_amid_generation)

    def _save_amid_generation(self) -> None:
        self._quieten_rollout()
        self._save_checkpoint()

    def _quieten_rollout(self) -> None:
        """Hand the devices to the trainer, in the midst of generation."""

    def _end_if_asked(self, save: Any = None) -> bool:
        """If the run was asked to end: save, and let this step be verl's last."""
        ends = self._stopping.ends_after(self.global_steps, self._save_checkpoint if save is None else save)
        if ends:
            self.total_training_steps = self.global_steps
        return ends

    def _leave_step(self, stop: StopRequested) -> None:
        """Save what can be saved when the rollouts that the step needs did not come in time."""
        step = self._stopping.step_to_save(self.global_steps, stop)
        if step is not None:
            self.global_steps = step
            self._save_amid_generation()

    def _save_checkpoint(self) -> None:
        # What is in flight under exact staleness needs weights that a restart would no longer have, if they are not
        # those of the checkpoint.
        if isinstance(self.replay_buffer.rule, ExactStale) and self.replay_buffer.version < self.global_steps:
            self.replay_buffer.settle()
        state = self.replay_buffer.state_dict() | self._state.state_dict()
        with self._progress.paused():
            self._persistence.save(self, state, super()._save_checkpoint)

    def _load_checkpoint(self) -> None:
        watch_workers(self._watch, self)  # verl has just started them, and takes as long again to start the rest
        super()._load_checkpoint()
        self._state.load_state_dict(self._persistence.state)
        self._persistence.restore(self.replay_buffer, self.config, self.global_steps, self._draw_prompts)


@register_trainer("stale_k")
class PPOTrainerStaleK(_StalenessTrainer, PPOTrainerColocateAsync):
    """Every batch exactly k trainer steps old; trainer and rollout share the devices and take turns."""

    def get_llm_client(self) -> SpanRecordingClient:
        return self.llm_server_manager.get_client(client_cls=SpanRecordingClient)

    def on_sample_begin(self) -> None:
        # Putting the rollout to sleep aborts what is running; nothing may be, it would resume with other weights.
        # Before a batch is taken, so that a run that is asked to end meanwhile has not begun the step.
        self.replay_buffer.settle()
        super().on_sample_begin()

    def on_sample_end(self) -> None:
        self.replay_buffer.settle()
        super().on_sample_end()

    def on_step_end(self) -> None:
        if not self._end_if_asked():
            self.replay_buffer.prefetch.look()
            with self._limits.push(self.global_steps):
                super().on_step_end()
            self.replay_buffer.advance(self.global_steps)

    def _quieten_rollout(self) -> None:
        self.checkpoint_manager.abort_replicas()
        self.checkpoint_manager.sleep_replicas()


@register_trainer("replay")
class PPOTrainerReplay(MovingReference, PPOTrainerStaleK):
    """A batch is part new, part trained before; trainer and rollout share the devices and take turns."""


@register_trainer("stale_k_separate")
class PPOTrainerStaleKSeparate(OnOwnDevices, _StalenessTrainer, PPOTrainerSeparateAsync):
    """Every batch exactly k trainer steps old; one batch is generated while another is trained."""


@register_trainer("bounded_async")
class PPOTrainerBoundedAsync(OnOwnDevices, _StalenessTrainer, PPOTrainerSeparateAsync):
    """No trained token older than the bound; generation is interrupted by a weight update and goes on after it."""

    def step(self, metrics: dict, timing_raw: dict) -> KVBatchMeta:
        """As verl's; what the step has shown then moves an adaptive bound, before a checkpoint of the step is saved."""
        batch = super().step(metrics, timing_raw)
        if isinstance(rule := self.replay_buffer.rule, AdaptiveAsync):
            metrics |= move_bound(rule, self._updates.clock, metrics, self.replay_buffer.metrics.waiting_share)
        return batch
