"""verl's replay buffer, with the decision left to a rule: admits, waits, selects and hands over."""

from collections.abc import Callable, Sequence
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import DAPO_FILTERED_REWARD_COUNTS_KEY, ReplayBufferAsync
from verl.utils import tensordict_utils as tu

from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.heal.poisoned import PoisonedPrompts
from verl_m2po.staleness.intake import Intake
from verl_m2po.staleness.prefetch import Prefetch
from verl_m2po.staleness.restart.backlog import Backlog
from verl_m2po.staleness.restart.buffer_state import BufferState
from verl_m2po.staleness.rollout.reports import Reports
from verl_m2po.staleness.rows.store import LotStore
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import Group, Selection, Ticket
from verl_m2po.staleness.rule.rules import StalenessRule, StalenessViolation, require_within
from verl_m2po.staleness.rule.units import version_at_step
from verl_m2po.staleness.watch.stop import StopRequest


class _ListsValidationOnly(ReplayBufferAsync):
    """verl's buffer, whose listing of all rows is one of validation rows: the others are never listed.

    Args:
        stop: ends a validation of a run that was asked to end.
        tend: called while the trainer waits, with the weight version that the rollout holds: servers may join.
        of_verl: further arguments of verl's. It judges no age: the rule does.
    """

    def __init__(self, stop: StopRequest, tend: Callable[[int], None] | None, **of_verl: Any) -> None:
        super().__init__(
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=DictConfig({}),
            poll_interval=0.02,
            **of_verl,
        )
        self._stop, self._tend = stop, tend
        self.version = 0
        """Weight version that the rollout holds."""

    def _tend_servers(self) -> None:
        if self._tend is not None:
            self._tend(self.version)

    def _sync_metadata_from_transfer_queue(self) -> None:
        self._tend_servers()
        self._stop.give_up_waiting_for("the responses for validation are not there yet")
        by_status = {
            "pending": self.pending_keys,
            "running": self.running_keys,
            "finished": self.finished_keys,
            "failure": self.failure_keys,
        }
        for table in (self.partitions, self.prompt_global_steps, *by_status.values()):
            table.clear()
        for key, tag in tq.kv_list("val").get("val", {}).items():
            if tag.get("is_prompt", False):
                self.prompt_global_steps["val"][key] = tag["global_steps"]
                by_status[tag["status"]]["val"].add(key)
            else:
                self.partitions["val"][key] = tag


def _require_held(version: int, held: int, step: int) -> None:
    if version != held:
        raise StalenessViolation(f"trainer step {step} trains from weight version {version}, the rollout holds {held}")


class StalenessReplayBuffer(_ListsValidationOnly):
    """Admits, waits, selects and deletes as its rule says, and tells its listeners.

    Cost per trainer step is that of the rows of that step, whatever the depth. Validation goes through verl's code.

    Args:
        rule: decides.
        metrics: counts what happens in a step; told of every event.
        failures: stops the run when too many groups fail; told of every event.
        listeners: told of every event before those two: the ledger, the journal.
        dispatch: starts that many new groups; it must call `open_groups` for them.
        stop: ends a wait of a run that was asked to end.
        tend: see `_ListsValidationOnly`.
        poisoned: prompts that are not generated.
        trainer_mode, trainer_config: for verl.
        prefetch: unpack the next batch while the present one trains.
    """

    def __init__(
        self,
        *,
        rule: StalenessRule,
        metrics: StalenessMetrics,
        failures: FailureWindow,
        listeners: Sequence[events.Listener] = (),
        dispatch: Callable[[int], Any],
        stop: StopRequest,
        tend: Callable[[int], None] | None = None,
        poisoned: PoisonedPrompts | None = None,
        trainer_mode: str,
        trainer_config: Any,
        prefetch: bool = True,
    ) -> None:
        super().__init__(stop, tend, trainer_mode=trainer_mode, trainer_config=trainer_config, refill_fn=dispatch)
        self.rule, self.metrics = rule, metrics
        self.replayed: frozenset[str] = frozenset()
        """Groups of the batch that was handed out last that were trained before."""
        self._listeners = (*listeners, metrics, failures)
        self._dispatch, self._store = dispatch, LotStore()
        self.prefetch = Prefetch(rule, self._store, prefetch)
        self._intake = Intake(rule, self._store, self.tell, stop)
        self.backlog = Backlog(rule, self._store)
        self._parts = BufferState(rule, self.backlog, failures, metrics)
        self._regenerate: Callable[[list[Ticket], TensorDict], None] | None = None
        self._poisoned = poisoned

    def tell(self, event: events.Event) -> None:
        """Tell every listener of `event`."""
        for listener in self._listeners:
            listener.on_event(event)

    def connect(self, reports: Reports, regenerate: Callable[[list[Ticket], TensorDict], None] | None = None) -> None:
        """Listen to `reports` from now on.

        Args:
            regenerate: starts groups again whose prompts are already in the store; needed after a restart.
        """
        self._intake.connect(reports)
        self._regenerate = regenerate

    def begin(self, version: int) -> None:
        """A run starts, or starts again, from weight `version`: 0 without a checkpoint."""
        self.version = version
        self._take_arrivals()
        self.tell(events.Resumed(version))

    def open_groups(self, uids: list[str], prompt_indices: list[int | str], prompts: TensorDict) -> list[Ticket]:
        """Record groups that are about to be generated with the present weights.

        Args:
            uids: verl's group ids.
            prompt_indices: positions or names in the data set, -1 where unknown.
            prompts: what the data set gave, one row per group.
        """
        tickets = [self.rule.admit(uid, self.version, index) for uid, index in zip(uids, prompt_indices, strict=True)]
        self._store.put_prompts(tickets, prompts)
        self.tell(events.Dispatched(tuple(tickets)))
        return tickets

    def without_poisoned(self, tickets: list[Ticket], prompts: TensorDict) -> tuple[list[Ticket], TensorDict | None]:
        """Of groups that are about to be generated those whose prompt was not set aside before; None for no prompts."""
        if self._poisoned is None or not any(self._poisoned.has(ticket.prompt_index) for ticket in tickets):
            return tickets, prompts
        kept = [place for place, ticket in enumerate(tickets) if not self._poisoned.has(ticket.prompt_index)]
        for ticket in tickets:
            if self._poisoned.has(ticket.prompt_index):
                self._intake.refuse(ticket)
        return [tickets[place] for place in kept], tu.index_select_tensor_dict(prompts, kept) if kept else None

    def reopen_groups(self) -> tuple[list[Ticket], TensorDict | None]:
        """Groups to be generated again with the present weights: a restart has lost them, or deaths of their servers.

        Those that newer weights had begun to generate before a restart follow when the run has come to these weights
        again. Of those that may have killed their servers there is one at a time.
        """
        due = [*self.backlog.due_again(self.version), *self._intake.suspects.due()]
        tickets = [self.rule.reissue(uid, self.version) for uid in due]
        if not tickets:
            return [], None
        self.tell(events.Dispatched(tuple(tickets), again=True))
        return tickets, self._store.get_prompts(tickets)

    def _take_arrivals(self) -> None:
        for group in self.backlog.arrived(self.version):
            self.tell(events.Returned(self.rule.finish(group.ticket.uid, group.rows)))

    def advance(self, version: int) -> None:
        """The rollout holds weight `version` now: abort what that makes useless, start what it makes possible."""
        self.version = version
        self.tell(events.Advanced(version))
        self._take_arrivals()
        if expired := self.rule.expired(version):
            self._intake.reports.abort(expired)
        self.pump()

    def pump(self) -> None:
        """Start what is to be generated again, and as many groups as the rule admits."""
        tickets, prompts = self.reopen_groups()
        if prompts is not None and self._regenerate is not None:
            self._regenerate(tickets, prompts)
        if groups := self.rule.admissible(self.version):
            self._dispatch(groups)

    def settle(self) -> None:
        """Wait until the weights may change: until nothing in flight would be spoiled by it."""
        self.wait_until(lambda: self.rule.settled(self.version), "the present weights still have to generate")

    def wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        """Start groups and take reports until `is_done`; `what` is not so yet, for the log."""
        self._intake.wait_until(is_done, self._turn, self.prefetch.look, what)

    def _turn(self) -> None:
        self._tend_servers()
        self.pump()

    def get_sampleable_count(self, global_steps: int, partition_id: str) -> int:
        """Groups of the batch of trainer step `global_steps` that are there, at most all; see verl's."""
        if partition_id == "val":
            return super().get_sampleable_count(global_steps, partition_id)
        return len(self._sampleable(global_steps))

    def _sampleable(self, global_steps: int) -> set[str]:
        groups = self.rule.expected(version_at_step(global_steps), self.rule.batch_size)
        return {group.ticket.uid for group in groups}

    def wait_for_sampleable(self, global_steps: int, partition_id: str, count: int) -> tuple[set[str], dict]:
        """Wait until `count` groups of that batch are there; see verl's, which lends the training devices meanwhile."""
        if partition_id == "val":
            return super().wait_for_sampleable(global_steps, partition_id, count)
        what = f"{count} groups of the next batch are not there yet"
        self.wait_until(lambda: len(self._sampleable(global_steps)) >= count, what)
        return self._sampleable(global_steps), {}

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """The next `batch_size` groups; see verl's `ReplayBuffer.sample`.

        Raises:
            StalenessViolation: the batch is not as old as the rule promises.
        """
        if partition_id == "val":
            return super().sample(global_steps, partition_id, batch_size)
        _require_held(version := version_at_step(global_steps), self.version, global_steps)
        self.prefetch.expect(version, batch_size)
        selection = self._wait_for_selection(batch_size)
        require_within(self.rule, selection, version)
        batch = self.prefetch.hand_over(selection)
        self._delete(selection.used_up)
        self.tell(events.Trained(global_steps, version, selection))
        self.replayed = selection.replayed
        return batch, {}

    def _wait_for_selection(self, batch_size: int) -> Selection:
        found: list[Selection] = []

        def try_select() -> bool:
            selection = self.rule.select(self.version, batch_size)
            if selection is None:
                return False
            self._delete((*selection.evicted, *selection.retired))
            if selection.evicted:
                self.tell(events.Evicted(selection.evicted))
            if selection.groups:
                found.append(selection)
            return bool(selection.groups)

        self.wait_until(try_select, f"a batch of {batch_size} groups is not there yet")
        return found[0]

    def _delete(self, groups: tuple[Group, ...]) -> None:
        self.prefetch.forget(groups)
        self._store.delete([(group.ticket, group.rows) for group in groups])

    def step_metrics(self) -> dict[str, Any]:
        """The metrics of the trainer step that ends now; of groups without advantage verl's trainer draws a table."""
        counts = {DAPO_FILTERED_REWARD_COUNTS_KEY: self.metrics.set_aside_by_value}
        return counts | self.prefetch.step_metrics() | self.metrics.take(self.rule.in_flight, self.rule.ready)

    def state_dict(self) -> dict[str, Any]:
        """Everything besides TransferQueue's own checkpoint that is needed to go on, as plain JSON.

        Take it right before TransferQueue's: a group that finishes in between is then generated again, not lost.
        """
        self._intake.take(timeout_s=0.0)
        self.prefetch.give_back()
        return self._parts.to_json(self.version)

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Go on from `state`; see `BufferState.load`. Before `begin`, and after TransferQueue has its checkpoint."""
        self._parts.load(state, version)
