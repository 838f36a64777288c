# pyright: reportAbstractUsage=false
# tensordict's tensor classes are made at run time.
"""verl's replay buffer, with the decision left to a rule: the glue between a rule, TransferQueue and the workers."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

from verl_m2po.staleness.account.ledger import TrainedRowsLedger
from verl_m2po.staleness.account.metrics import StalenessMetrics
from verl_m2po.staleness.restart.journal import Journal, JournalError, Replay
from verl_m2po.staleness.restart.resume import STATE_FORMATS
from verl_m2po.staleness.rollout.reports import Reports
from verl_m2po.staleness.rows.store import LotStore
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.records import Group, GroupReport, Selection, Ticket
from verl_m2po.staleness.rule.rules import StalenessRule, StalenessViolation
from verl_m2po.staleness.rule.units import UpdateClock, version_at_step
from verl_m2po.staleness.watch.liveness import WorkerDied
from verl_m2po.staleness.watch.stop import StopRequest

logger = logging.getLogger(__name__)

WAIT_S = 1.0
"""Longest single wait for a report; waiting is event-driven, this only bounds how late a log line comes."""

LOG_WAITING_EVERY_S = 60.0

STATE_VERSION = STATE_FORMATS[-1]
"""Format of `StalenessReplayBuffer.state_dict`."""


class StalenessReplayBuffer(ReplayBufferAsync):
    """Admits, waits, selects and deletes as its rule says.

    Cost per trainer step is that of the rows of that step, whatever the depth. Validation samples are verl's business
    and go through verl's code, which then lists the validation partition only.

    Args:
        rule: decides.
        clock: converts units, for the metrics.
        failures: stops the run when too many groups fail.
        ledger: records what was trained; None records nothing.
        journal: outlives a crash with what was dispatched since the last checkpoint; None for none.
        dispatch: starts that many new groups; it must call `open_groups` for them.
        stop: ends a wait of a run that was asked to end.
        trainer_mode: for verl.
        trainer_config: for verl.
    """

    def __init__(
        self,
        *,
        rule: StalenessRule,
        clock: UpdateClock,
        failures: FailureWindow,
        ledger: TrainedRowsLedger | None,
        journal: Journal | None = None,
        dispatch: Callable[[int], Any],
        stop: StopRequest,
        trainer_mode: str,
        trainer_config: Any,
    ) -> None:
        super().__init__(
            trainer_mode=trainer_mode,
            trainer_config=trainer_config,
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=DictConfig({}),
            poll_interval=0.02,
            refill_fn=dispatch,
        )
        self.rule = rule
        self.version = 0
        self.metrics = StalenessMetrics(clock)
        self._failures = failures
        self._ledger = ledger
        self._dispatch = dispatch
        self._stop = stop
        self._journal = journal
        self._store = LotStore()
        self._reports: Reports | None = None
        self._regenerate: Callable[[list[Ticket], TensorDict], None] | None = None
        self._arrivals: dict[int, list[Group]] = defaultdict(list)
        self._reissues: dict[int, list[str]] = defaultdict(list)

    def connect(self, reports: Reports, regenerate: Callable[[list[Ticket], TensorDict], None] | None = None) -> None:
        """Listen to `reports` from now on.

        Args:
            regenerate: starts groups again whose prompts are already in the store; needed after a restart.
        """
        self._reports = reports
        self._regenerate = regenerate

    def begin(self, version: int) -> None:
        """A run starts, or starts again, from weight `version`: 0 without a checkpoint.

        Args:
            version: what the rollout will hold.
        """
        self.version = version
        self._take_arrivals()
        if self._ledger is not None:
            self._ledger.resumed(version)

    def open_groups(self, uids: list[str], prompt_indices: list[int | str], prompts: TensorDict) -> list[Ticket]:
        """Record groups that are about to be generated with the present weights.

        Args:
            uids: verl's group ids.
            prompt_indices: positions or names in the data set, -1 where unknown.
            prompts: what the data set gave, one row per group.
        """
        tickets = [self.rule.admit(uid, self.version, index) for uid, index in zip(uids, prompt_indices, strict=True)]
        self._store.put_prompts(tickets, prompts)
        if self._journal is not None:
            self._journal.dispatched(tickets)
        self.metrics.admitted(len(tickets))
        return tickets

    def reopen_groups(self) -> tuple[list[Ticket], TensorDict | None]:
        """Groups that were in flight when a run stopped, to be generated again with the present weights.

        Those that newer weights had begun to generate follow when the run has come to these weights again.
        """
        due = [version for version in self._reissues if version <= self.version]
        uids = [uid for version in sorted(due) for uid in self._reissues.pop(version)]
        if not uids:
            return [], None
        tickets = [self.rule.reissue(uid, self.version) for uid in uids]
        if self._journal is not None:
            self._journal.dispatched(tickets, again=True)
        self.metrics.admitted(len(tickets))
        return tickets, self._store.get_prompts(tickets)

    def _take_arrivals(self) -> None:
        """Groups that were generated before the crash, and are as old as they were then, count as finished now."""
        for version in sorted(version for version in self._arrivals if version <= self.version):
            for group in self._arrivals.pop(version):
                self._failures.kept(self.rule.finish(group.ticket.uid, group.rows).masked_share)

    def advance(self, version: int) -> None:
        """The rollout holds weight `version` from now on: abort what that makes useless, start what it makes possible.

        Args:
            version: the new weight version.
        """
        self.version = version
        if self._ledger is not None:
            self._ledger.advanced()
        self._take_arrivals()
        if expired := self.rule.expired(version):
            self._connected().abort(expired)
        tickets, prompts = self.reopen_groups()
        if prompts is not None and self._regenerate is not None:
            self._regenerate(tickets, prompts)
        self.pump()

    def pump(self) -> None:
        """Start as many groups as the rule admits."""
        if groups := self.rule.admissible(self.version):
            self._dispatch(groups)

    def settle(self) -> None:
        """Wait until the weights may change: until nothing in flight would be spoiled by it."""
        self._wait_until(lambda: self.rule.settled(self.version), "the present weights still have to generate")

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """The next `batch_size` groups; see verl's `ReplayBuffer.sample`.

        Raises:
            StalenessViolation: the batch is not as old as the rule promises.
        """
        if partition_id == "val":
            return super().sample(global_steps, partition_id, batch_size)
        version = version_at_step(global_steps)
        if version != self.version:
            raise StalenessViolation(
                f"trainer step {global_steps} trains from weight version {version}, the rollout holds {self.version}"
            )
        selection = self._wait_for_selection(batch_size)
        self._check(selection)
        batch = self._store.move_to_train(selection.groups, selection.oldest_version)
        self.metrics.trained(selection.groups, version, selection.oldest_version)
        if self._ledger is not None:
            self._ledger.trained(global_steps, version, selection.oldest_version, selection.groups)
        return batch, {}

    def _wait_for_selection(self, batch_size: int) -> Selection:
        found: list[Selection] = []

        def try_select() -> bool:
            selection = self.rule.select(self.version, batch_size)
            if selection is None:
                return False
            if selection.evicted:
                self._store.delete([(group.ticket, group.rows) for group in selection.evicted])
                if self._ledger is not None:
                    self._ledger.evicted(selection.evicted)
                for group in selection.evicted:
                    self.metrics.dropped(group)
            if selection.groups:
                found.append(selection)
            return bool(selection.groups)

        self._wait_until(try_select, f"a batch of {batch_size} groups is not there yet")
        return found[0]

    def _check(self, selection: Selection) -> None:
        """Row by row, right before training: no token that stays is older than the bound, none is from the future."""
        oldest = self.version - self.rule.staleness_steps
        wrong = [
            f"row {row.key}, spans {row.spans}"
            for group in selection.groups
            for row in group.rows
            if row.max_version > self.version or (selection.oldest_version is None and row.min_version < oldest)
        ]
        if wrong or (selection.oldest_version is not None and selection.oldest_version < oldest):
            raise StalenessViolation(
                f"{self.rule.name} at weight version {self.version} allows versions {oldest} to {self.version}, but "
                f"{len(wrong)} rows of the batch are outside: " + "; ".join(wrong[:8])
            )

    def _wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        began_at = logged_at = time.monotonic()
        self._take_reports(timeout_s=0.0)
        self.pump()
        while not is_done():
            self._stop.give_up_waiting_for(what)
            self.pump()
            self._take_reports(WAIT_S)
            if time.monotonic() - logged_at > LOG_WAITING_EVERY_S:
                logged_at = time.monotonic()
                logger.info(
                    "waiting for %.0f s: %s (in flight %d, ready %d, weight version %d)",
                    logged_at - began_at,
                    what,
                    self.rule.in_flight,
                    self.rule.ready,
                    self.version,
                )
        self.metrics.trainer_waited(time.monotonic() - began_at)

    def _connected(self) -> Reports:
        if self._reports is None:
            raise RuntimeError("the staleness buffer is used before the agent loop workers are there")
        return self._reports

    def _take_reports(self, timeout_s: float) -> None:
        reports = self._connected().wait(timeout_s)
        for report in reports:
            self._take_report(report)
        if reports and not self.rule.in_flight:
            self.metrics.generator_idle(since=max(report.finished_at for report in reports))

    def _take_report(self, report: GroupReport) -> None:
        if report.error is None:
            group = self.rule.finish(report.uid, report.rows)
            if self._ledger is not None:
                self._ledger.finished(report)
            self.metrics.masked(len(report.masked_errors))
            self._failures.kept(group.masked_share, report.masked_errors)
            return
        if report.was_lost:
            # Still in flight, so that it is generated again after the restart and no other prompt takes its place.
            raise WorkerDied(f"group {report.uid} cannot be generated, a process of the run is gone: {report.error}")
        ticket = self.rule.fail(report.uid)
        if self._journal is not None:
            self._journal.failed(report.uid)
        self._store.delete([(ticket, report.rows)])
        if report.was_aborted:
            self.metrics.aborted(report.generated_tokens / report.responses)
            return
        self.metrics.failed()
        self._failures.failed(report.error)

    def step_metrics(self) -> dict[str, float]:
        """The metrics of the trainer step that ends now."""
        return self.metrics.take(self.rule.in_flight, self.rule.ready)

    def state_dict(self) -> dict[str, Any]:
        """Everything besides TransferQueue's own checkpoint that is needed to go on, as plain JSON.

        Take it right before TransferQueue's: a group that finishes in between is then generated again, not lost.
        """
        self._take_reports(timeout_s=0.0)
        return {
            "state_version": STATE_VERSION,
            "version": self.version,
            "rule": self.rule.state_dict(),
            "arrivals": [group.to_json() for groups in self._arrivals.values() for group in groups],
            "failures": self._failures.state_dict(),
            "metrics": self.metrics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], version: int) -> None:
        """Go on from `state`, before `begin` and after TransferQueue has loaded its checkpoint.

        Args:
            state: what `state_dict` returned.
            version: weights of the checkpoint, which the rollout will hold.

        Raises:
            ValueError: it was written by another version of this package or under another schedule.
            StalenessViolation: it ends a run, and cannot be made longer at the same staleness.
            RuntimeError: TransferQueue lacks rows that the state waits for.
        """
        if state.get("state_version") not in STATE_FORMATS:
            raise ValueError(f"staleness state of format {state.get('state_version')!r}, readable are {STATE_FORMATS}")
        if "failures" in state:  # format 1 has none
            self._failures.load_state_dict(state["failures"])
            self.metrics.load_state_dict(state["metrics"])
        self.rule.load_state_dict(state["rule"])
        self.rule.check_resumable(version)
        ready = [Group.from_json(data) for data in state["rule"]["ready"]]
        arrivals = [Group.from_json(data) for data in state.get("arrivals", [])]
        arrived = {group.ticket.uid for group in arrivals}
        tickets = [ticket for ticket in self.rule.in_flight_tickets() if ticket.uid not in arrived]
        deleted = self._store.restore(tickets, [*ready, *arrivals])
        for group in arrivals:
            self._expect(group)
        for ticket in tickets:
            self._reissues[ticket.dispatch_version].append(ticket.uid)
            self.rule.postpone(ticket.uid)
        logger.info(
            "restored %d waiting groups, %d to generate again, deleted %d orphan rows",
            len(ready) + len(arrivals),
            len(tickets),
            deleted,
        )

    def _expect(self, group: Group) -> None:
        """`group` arrives when the run has come to the newest weights that generated a token of it."""
        self._arrivals[group.max_version].append(group)
        self.rule.postpone(group.ticket.uid)

    def replay(self, replay: Replay, draw: Callable[[int], tuple[list[int | str], TensorDict]]) -> None:
        """Take back what the journal knows beyond the checkpoint, after `load_state_dict` and before `begin`.

        Args:
            replay: what the journal knows.
            draw: the next prompts of the data set, that many: their names or positions, and the prompts.

        Raises:
            JournalError: the data set gives other prompts than it gave then.
        """
        for kind, what in replay.events:
            if kind == "dispatched":
                self._readmit(what, *draw(len(what)))
            elif kind == "again":
                for ticket in what:
                    self.rule.readmit(ticket)
            else:
                self._store.delete([(self.rule.fail(what), ())])
        self._reissues.clear()
        expected = {group.ticket.uid for groups in self._arrivals.values() for group in groups}
        tickets = [ticket for ticket in self.rule.in_flight_tickets() if ticket.uid not in expected]
        taken = 0
        for ticket in tickets:
            finished = replay.finished.get(ticket.uid)
            if finished is None:
                self._reissues[ticket.dispatch_version].append(ticket.uid)
                self.rule.postpone(ticket.uid)
            else:
                self._store.put_rows(ticket, finished.rows, finished.packed)
                self._expect(Group(ticket, finished.rows))
                taken += 1
        logger.info("the journal gave back %d finished groups, %d are generated again", taken, len(tickets) - taken)

    def _readmit(self, tickets: list[Ticket], indices: list[int | str], prompts: TensorDict) -> None:
        for ticket, index in zip(tickets, indices, strict=True):
            if ticket.prompt_index != index:
                raise JournalError(
                    f"the journal dispatched prompt {ticket.prompt_index} at place {ticket.place}, where the data set "
                    f"now gives prompt {index}: it is another data set, or in another order. Resume with the old one, "
                    "or without the journal (journal=false)"
                )
            self.rule.readmit(ticket)
        prompts["uid"] = NonTensorStack(*[ticket.uid for ticket in tickets])
        self._store.put_prompts(tickets, prompts)

    def _sync_metadata_from_transfer_queue(self) -> None:
        """verl's listing, of the validation partition only; training rows are never listed."""
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
