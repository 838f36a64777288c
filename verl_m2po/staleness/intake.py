"""From reports of the agent loop workers to groups that wait: what has finished, failed or was lost."""

import logging
import time
from collections.abc import Callable

from verl_m2po.staleness.heal.suspects import Suspects
from verl_m2po.staleness.rollout.reports import Reports
from verl_m2po.staleness.rows.store import LotStore
from verl_m2po.staleness.rule.events import Event, Failed, Finished, GeneratorIdle, Lost, SetAside, TrainerWaited
from verl_m2po.staleness.rule.records import GroupReport, Ticket
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.watch.liveness import WorkerDied
from verl_m2po.staleness.watch.stop import StopRequest

logger = logging.getLogger(__name__)

WAIT_S = 1.0
"""Longest single wait for a report; waiting is event-driven, this only bounds how late a log line comes."""

LOG_WAITING_EVERY_S = 60.0


class Intake:
    """Takes reports, and tells what they say.

    Args:
        rule: is told what has ended.
        store: loses the rows of what failed.
        tell: gets the events.
        stop: ends a wait of a run that was asked to end.
    """

    def __init__(self, rule: StalenessRule, store: LotStore, tell: Callable[[Event], None], stop: StopRequest) -> None:
        self._rule, self._store, self._tell, self._stop = rule, store, tell, stop
        self._reports: Reports | None = None
        self.suspects = Suspects()

    def connect(self, reports: Reports) -> None:
        """Listen to `reports` from now on."""
        self._reports = reports

    @property
    def reports(self) -> Reports:
        """Where reports come from.

        Raises:
            RuntimeError: nobody has connected them.
        """
        if self._reports is None:
            raise RuntimeError("the staleness buffer is used before the agent loop workers are there")
        return self._reports

    def take(self, timeout_s: float) -> None:
        """Take what has been reported; waits up to `timeout_s` seconds for the first report.

        Raises:
            WorkerDied: a group was lost with a process of the run that is not replaced.
        """
        reports = self.reports.wait(timeout_s)
        for report in reports:
            self._take_one(report)
        if reports and not self._rule.in_flight:
            self._tell(GeneratorIdle(since=max(report.finished_at for report in reports)))

    def _take_one(self, report: GroupReport) -> None:
        if report.was_lost:
            self._take_lost(report)
            return
        self.suspects.end(report.uid)
        if report.error is None and report.shared_metric is None:
            self._tell(Finished(self._rule.finish(report.uid, report.rows), report))
            return
        ticket = self._fail(report, Failed if report.error is not None else SetAside)
        if report.error is not None and not report.was_aborted:
            logger.warning("the group of prompt %s failed: %s", ticket.prompt_index, report.error)

    def _take_lost(self, report: GroupReport) -> None:
        if not report.deaths:
            # Still in flight, so that it is generated again after the restart and no other prompt takes its place.
            raise WorkerDied(f"group {report.uid} cannot be generated, a process of the run is gone: {report.error}")
        if self.suspects.lose(report.uid, report.deaths):
            ticket = self._fail(report, Failed)
            logger.error(
                "prompt %s kills what generates it (%s): it is set aside as poisoned", ticket.prompt_index, report.error
            )
            return
        ticket = self._rule.ticket(report.uid)
        self._store.delete_rows(ticket)
        self._tell(Lost(ticket, report))

    def refuse(self, ticket: Ticket) -> None:
        """The prompt of a group that was just admitted is poisoned: it fails before it starts."""
        self._fail(
            GroupReport(ticket.uid, (), f"prompt {ticket.prompt_index} was set aside as poisoned before"), Failed
        )

    def _fail(self, report: GroupReport, event: type[Failed] | type[SetAside]) -> Ticket:
        ticket = self._rule.fail(report.uid)
        self._store.delete([(ticket, report.rows)])
        self._tell(event(ticket, report))
        return ticket

    def wait_until(
        self, is_done: Callable[[], bool], pump: Callable[[], None], meanwhile: Callable[[], None], what: str
    ) -> None:
        """Take reports, and start groups, until `is_done`.

        Args:
            is_done: asked after every report.
            pump: starts what may be started.
            meanwhile: what else may be done at every turn of a wait; it must not wait itself.
            what: what is not so yet, for the log.

        Raises:
            StopRequested: the run was asked to end, and it takes too long.
        """
        began_at = logged_at = time.monotonic()
        self.take(timeout_s=0.0)
        pump()
        while not is_done():
            self._stop.give_up_waiting_for(what)
            pump()
            meanwhile()
            self.take(WAIT_S)
            if time.monotonic() - logged_at > LOG_WAITING_EVERY_S:
                logged_at = time.monotonic()
                seconds, rule = logged_at - began_at, self._rule
                logger.info(
                    "waiting for %.0f s: %s (in flight %d, ready %d)", seconds, what, rule.in_flight, rule.ready
                )
        self._tell(TrainerWaited(time.monotonic() - began_at))
