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

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.utils import tensordict_utils as tu

from verl_m2po.ground import logs
from verl_m2po.patches import verl as verl_patches

# As a module: where the buffer is imported first, verl imports this file before the buffer has its class.
from verl_m2po.staleness import buffer, checks
from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.config import BoundedAsyncConfig, load_mode_config, make_clock
from verl_m2po.staleness.needs import set_what_the_mode_needs
from verl_m2po.staleness.restart import random_states, resume
from verl_m2po.staleness.restart.checkpoint import Checkpoints, folder_name
from verl_m2po.staleness.restart.journal import RUN_FILE, Journal
from verl_m2po.staleness.rollout.client import SpanRecordingClient
from verl_m2po.staleness.rollout.reports import WorkerReports
from verl_m2po.staleness.rows.store import LOT_FIELD, lot_partition
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import Ticket
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.watch.liveness import Watch
from verl_m2po.staleness.watch.stop import StopRequest, StopRequested

logger = logging.getLogger(__name__)

AGE_FIELD = "age_updates"
"""Field of a row in TransferQueue; `verl_m2po.actor.worker` reads it under the same name."""


class NoCallback:
    """Stands in for the user's checkpoint callback. verl 0.9.0 knows no callbacks, so this is no class of verl's."""

    def on_save(self, **about: Any) -> None:
        """Do nothing."""


def require_sound(problems: list[checks.Problem]) -> None:
    """Warn of what is odd, refuse what contradicts the configured staleness.

    Raises:
        checks.PreflightError: with every fatal problem.
    """
    for problem in problems:
        if not problem.is_fatal:
            logger.warning("%s", problem)
    if fatal := [problem for problem in problems if problem.is_fatal]:
        raise checks.PreflightError("\n".join(map(str, fatal)))


def _plain(index: Any) -> int | str:
    """A data set's index as JSON can hold it: data sets number their prompts, or name them."""
    value = index.item() if hasattr(index, "item") else index
    return value if isinstance(value, int) else str(value)


def _indices(batch: TensorDict) -> list[int | str]:
    """Positions or names of prompts in the data set, -1 where it has none."""
    return [_plain(index) for index in batch["index"]] if "index" in batch else [-1] * len(batch)


class _StalenessTrainer(PPOTrainer):
    """What the modes share. A mixin in front of verl's trainer classes."""

    replay_buffer: "buffer.StalenessReplayBuffer"

    def __init__(self, config: DictConfig) -> None:
        require_sound(checks.check(config, available_memory_bytes=psutil.virtual_memory().total))
        self._settings = resume.settings_of(config)
        set_what_the_mode_needs(config)
        self._checkpoints = Checkpoints(config.trainer.default_local_dir)
        self._resumed_from = resume.find(config.trainer)
        self._resumed_state: dict[str, Any] = {}
        if self._resumed_from is not None:
            self._resumed_state = self._read_checkpoint(self._resumed_from, config)
        if config.trainer.save_freq > 0:
            self._checkpoints.require_writable()
        settings = load_mode_config(config, config.trainer.v1.trainer_mode)
        self._stop = StopRequest(settings.stop_wait_s)
        self._watch = Watch()
        # Trainer steps: the last one that is on disk, and the last one that has taken rollouts to train on.
        self._saved_step = self._begun_step = 0
        self._journal: Journal | None = None
        if settings.journal:
            root = settings.journal_path or self._checkpoints.root / "journal"
            self._journal = Journal(root, settings.journal_fsync, self._settings)
        super().__init__(config)

    def _read_checkpoint(self, folder: Path, config: DictConfig) -> dict[str, Any]:
        """The state in the checkpoint `folder`, if this run can go on from there; read before anything is started."""
        state = resume.read_state(folder)
        require_sound(resume.check(folder, state, self._settings, resume.ranks_of(config)))
        return state

    def init(self) -> None:
        """As verl's; ends in an error if a process of the run dies meanwhile."""
        self._watch.add("TransferQueue controller", [ray.get_actor("TransferQueueController", "transfer_queue")])
        storage = [name for name in ray.util.list_named_actors() if name.startswith("TransferQueueStorageUnit")]
        self._watch.add("TransferQueue storage unit", [ray.get_actor(name) for name in sorted(storage)])
        with self._watch.guard():
            super().init()

    def on_init_end(self) -> None:
        """As verl's, which pushes the first weights, and would wait for ever for a rollout server that died."""
        self._watch_workers()
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

    def _watch_workers(self) -> None:
        """Watch the processes that the run depends on, as far as they are there, under the names that an error says."""
        managers = self._rollout_server_managers()
        replicas = [replica for manager in managers for replica in manager.get_replicas()]
        self._watch.add("actor worker", self.actor_rollout_wg.workers)
        self._watch.add("rollout server", [server for manager in managers for server in manager.server_handles])
        self._watch.add_engines("rollout engine", [a for manager in managers for a in manager.get_addresses()])
        self._watch.add("rollout worker", [worker for replica in replicas for worker in replica.workers])
        self._watch.add("rollout load balancer", [manager.global_load_balancer for manager in managers])
        self._watch.add("reward worker", self.get_reward_handles() or [])
        if (teachers := getattr(self, "teacher_model_manager", None)) is not None:
            self._watch.add("teacher server", [each for of in teachers.server_handles.values() for each in of])
            self._watch.add("teacher load balancer", list(teachers.load_balancer_handle.values()))
        if self.use_critic:
            self._watch.add("critic worker", self.critic_wg.workers)
        if self.use_reference_policy:
            self._watch.add("reference worker", self.ref_policy_wg.workers)

    def _make_rule(self, staleness_steps: int, batch_size: int) -> StalenessRule:
        return ExactStale(staleness_steps, batch_size)

    def _build_replay_buffer(self) -> "buffer.StalenessReplayBuffer":
        settings = load_mode_config(self.config, self.trainer_mode)
        clock = make_clock(self.config)
        return buffer.StalenessReplayBuffer(
            rule=self._make_rule(clock.steps(settings.staleness_updates), clock.train_batch_size),
            metrics=StalenessMetrics(clock),
            failures=FailureWindow(settings.max_failed_fraction, settings.failed_window_groups),
            listeners=[
                *([TrainedRowsLedger(settings.ledger_path)] if settings.ledger_path else []),
                *([self._journal] if self._journal is not None else []),
            ],
            dispatch=self._add_prompts_to_generate,
            stop=self._stop,
            trainer_mode=self.trainer_mode,
            trainer_config=self.config.trainer.v1[self.trainer_mode],
        )

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        prompts, batch = len(self.train_dataset), self.config.data.train_batch_size
        if prompts < batch:
            raise ValueError(
                f"the training set has {prompts} prompts, fewer than data.train_batch_size={batch}. Lower it, with "
                "actor_rollout_ref.actor.ppo_mini_batch_size, or give data.train_files more prompts; those longer than "
                "data.max_prompt_length are left out where data.filter_overlong_prompts=true"
            )
        rule, clock = self.replay_buffer.rule, make_clock(self.config)
        steps = checks.planned_steps(self.config, prompts)
        require_sound(checks.check_run_length(rule.staleness_steps, clock, self.trainer_mode, steps))
        rule.limit(steps)

    def on_train_begin(self) -> None:
        self.replay_buffer.tell(events.Began())
        self._stop.announce_training()
        # Instead of verl's warm-up batches: the rule admits the ramp.
        self.replay_buffer.pump()

    def prepare_step(self) -> dict:
        return {}

    def _submit_batch_to_rollout(self, batch: TensorDict) -> int:
        self._generate(self.replay_buffer.open_groups(list(batch["uid"]), _indices(batch), batch), batch)
        return len(batch)

    def _draw_prompts(self, count: int) -> tuple[list[int | str], TensorDict]:
        """The next `count` prompts of the data set, with their names."""
        batch = self._next_train_batch(count)
        return _indices(batch), batch

    def _generate(self, tickets: list[Ticket], prompts: TensorDict) -> None:
        # The step that starts from the present weights. It may be one ahead of verl's counter at the end of a step.
        tu.assign_non_tensor_data(prompts, "global_steps", self.replay_buffer.version + 1)
        prompts[LOT_FIELD] = NonTensorStack(*[lot_partition(ticket.lot) for ticket in tickets])
        self.agent_loop_manager.generate_sequences(prompts)

    def _reissue_inflight_prompts(self, partition_id: str = "train") -> int:
        # verl calls this once, when the agent loop workers are there and before the first step.
        manager = self.agent_loop_manager
        self._reports = WorkerReports(manager.agent_loop_workers, manager.answer_timeout_s)
        self._reports.depend_on(self._watch.actors())
        self.replay_buffer.connect(self._reports, self._generate)
        if self._journal is not None:
            self._reports.journal_to(self._journal)
        tickets, prompts = self.replay_buffer.reopen_groups()
        if prompts is not None:
            self._generate(tickets, prompts)
            logger.info("generating %d groups again that were in flight at the checkpoint", len(tickets))
        return len(tickets)

    def on_sample_end(self) -> None:
        self._begun_step = self.global_steps
        super().on_sample_end()

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """As verl's, and the age of each row for the actor worker, which measures the mismatch floor at age zero."""
        batch = super()._compute_advantage(batch, metrics)
        clock = make_clock(self.config)
        ages = [
            clock.age_at_call_updates(tag["min_global_steps"], self.global_steps, self.local_trigger_step)
            for tag in batch.tags
        ]
        fields = TensorDict({AGE_FIELD: torch.tensor(ages)}, batch_size=len(ages))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _consume_sync_metrics(self) -> dict:
        return super()._consume_sync_metrics() | self.replay_buffer.step_metrics()

    def _save_checkpoint(self) -> None:
        # What is in flight under exact staleness needs weights that a restart would no longer have, if they are not
        # those of the checkpoint.
        if isinstance(self.replay_buffer.rule, ExactStale) and self.replay_buffer.version < self.global_steps:
            self.replay_buffer.settle()
        name, state = folder_name(self.global_steps), json.dumps(self._state(), separators=(",", ":"))
        if self._journal is not None:
            self._journal.next_segment()
            self._reports.journal_to(self._journal)
        with self._checkpoints.writing(self.global_steps, self._resumed_from) as incomplete:
            (incomplete / name / resume.STATE_FILE).write_text(state)
            if self._journal is not None:
                (incomplete / name / RUN_FILE).write_text(json.dumps(self._journal.position()))
            with self._verl_writes_into(incomplete):
                super()._save_checkpoint()
            resume.require_all_shards(incomplete / name)
        self._checkpoints.prune(self.global_steps, self._checkpoints_to_keep())
        if self._journal is not None:
            self._journal.delete_unneeded(self._checkpoints)
        self.checkpoint_callback.on_save(
            trainer=self,
            global_step=self.global_steps,
            checkpoint_dir=str(self._checkpoints.folder(self.global_steps)),
            async_save=False,
        )
        self._saved_step = self.global_steps

    def _state(self) -> dict[str, Any]:
        """What verl does not save, as plain JSON."""
        state = self.replay_buffer.state_dict() | {"settings": self._settings, "random_states": random_states.save()}
        if self.config.algorithm.use_kl_in_reward:
            state["kl_coefficient"] = self.kl_ctrl_in_reward.value
        return state

    @contextmanager
    def _verl_writes_into(self, folder: Path) -> Iterator[None]:
        """Let verl's `_save_checkpoint` write its checkpoint, its pointer included, into `folder`, and delete nothing.

        verl deletes the model of an old checkpoint before the new one is complete, and never the rest of it.
        """
        trainer, callback = self.config.trainer, getattr(self, "checkpoint_callback", NoCallback())
        redirected = {
            "default_local_dir": str(folder),
            "max_actor_ckpt_to_keep": None,
            "max_critic_ckpt_to_keep": None,
            "remove_previous_ckpt_in_save": False,
        }
        configured = {key: trainer[key] for key in redirected if key in trainer}
        self.checkpoint_callback = NoCallback()
        try:
            with open_dict(trainer):
                trainer.update(redirected)
            yield
        finally:
            with open_dict(trainer):
                for key in redirected:
                    del trainer[key]
                trainer.update(configured)
            self.checkpoint_callback = callback

    def _checkpoints_to_keep(self) -> int | None:
        """Whole checkpoints to keep: the most that verl's settings ask for, None for all."""
        trainer = self.config.trainer
        if trainer.get("remove_previous_ckpt_in_save"):
            return 1
        limits = [trainer.get("max_actor_ckpt_to_keep")]
        if self.use_critic:
            limits.append(trainer.get("max_critic_ckpt_to_keep"))
        return None if None in limits else max(limits)

    def _end_if_asked(self) -> bool:
        """After the updates of a step: if the run was asked to end, save, and let this step be verl's last."""
        if not self._stop.is_made():
            return False
        if self._saved_step < self.global_steps:
            self._save_checkpoint()
        self.total_training_steps = self.global_steps
        return True

    def _leave_step(self, stop: StopRequested) -> None:
        """Save what can be saved when the rollouts that the step needs did not come in time.

        A step without a batch has changed nothing: the checkpoint is that of the step before, with the rollouts that
        have been generated since.
        """
        logger.warning("%s", stop)
        if self._saved_step == self.global_steps:
            return  # only the push of its weights was still to come
        if self._begun_step == self.global_steps:
            logger.warning(
                "trainer step %d is lost: it waits for rollouts that only its own weights can generate. The last "
                "checkpoint is that of step %d",
                self.global_steps,
                self._saved_step,
            )
            return
        self.global_steps -= 1
        if self._saved_step < self.global_steps:
            self._quieten_rollout()
            self._save_checkpoint()

    def _quieten_rollout(self) -> None:
        """Hand the devices to the trainer, in the midst of generation."""

    def _load_checkpoint(self) -> None:
        self._watch_workers()  # verl has just started them, and takes as long again to start the rest
        super()._load_checkpoint()
        if self._resumed_from is not None:
            self._load_state()
            self._saved_step = self.global_steps
        if self._journal is not None:
            self._replay_journal(self._journal)
        self.replay_buffer.begin(self.global_steps)

    def _replay_journal(self, journal: Journal) -> None:
        """Take back what was generated since the checkpoint, or since the beginning where there is none."""
        position = journal.position_of(self._resumed_from)
        if self.config.trainer.resume_mode == "disable":
            position = None
        if position is not None:
            must_agree = resume.refused_keys(self.trainer_mode)
            if self._resumed_from is None:
                must_agree = [*must_agree, resume.MODEL]
            in_flight = [ticket.uid for ticket in self.replay_buffer.rule.in_flight_tickets()]
            replay = journal.read(position["segment"], self.global_steps, in_flight, must_agree)
            self.replay_buffer.backlog.replay(replay, self._draw_prompts)
        journal.start(position and position["run"], after=self._resumed_from)

    def _load_state(self) -> None:
        """What verl does not load."""
        state = self._resumed_state
        self.replay_buffer.load_state_dict(state, version=self.global_steps)
        if "random_states" in state:  # format 1 has none
            random_states.load(state["random_states"])
        if "kl_coefficient" in state and self.config.algorithm.use_kl_in_reward:
            self.kl_ctrl_in_reward.value = state["kl_coefficient"]
        self._resumed_state = {}


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
            super().on_step_end()
            self.replay_buffer.advance(self.global_steps)

    def _quieten_rollout(self) -> None:
        self.checkpoint_manager.abort_replicas()
        self.checkpoint_manager.sleep_replicas()


class _SeparateStalenessTrainer(_StalenessTrainer, PPOTrainerSeparateAsync):
    """What the modes on separate devices share."""

    def _setup(self) -> None:
        with verl_patches.quiet_separate_setup():
            super()._setup()

    def get_llm_client(self) -> SpanRecordingClient:
        return self.standalone_server_manager.get_client(client_cls=SpanRecordingClient)

    def on_step_end(self) -> None:
        if not self._end_if_asked():
            self.replay_buffer.settle()
            super().on_step_end()
            self.replay_buffer.advance(self.global_steps)


@register_trainer("stale_k_separate")
class PPOTrainerStaleKSeparate(_SeparateStalenessTrainer):
    """Every batch exactly k trainer steps old; one batch is generated while another is trained."""


@register_trainer("bounded_async")
class PPOTrainerBoundedAsync(_SeparateStalenessTrainer):
    """No trained token older than the bound; generation is interrupted by a weight update and goes on after it."""

    def _make_rule(self, staleness_steps: int, batch_size: int) -> StalenessRule:
        settings = load_mode_config(self.config, self.trainer_mode)
        assert isinstance(settings, BoundedAsyncConfig)
        return BoundedAsync(staleness_steps, batch_size, settings.min_usable_share)
