"""Waiting for groups to end, without polling: one open question per agent loop worker."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from verl_m2po.staleness.restart.frames import JournalError
from verl_m2po.staleness.restart.journal import Journal
from verl_m2po.staleness.rule.records import GroupReport

BLOCKED = (
    "An agent loop or a tool blocks its event loop, so that not even generation_timeout_s can end it: let it await, or "
    "put the blocking call into asyncio.to_thread"
)


def answer_timeout_s(generation_timeout_s: float | None) -> float | None:
    """Seconds without an answer after which an agent loop worker counts as blocked; None waits for ever.

    As long again as a generation may take: a worker that generates answers every few seconds, one that cannot answer
    cannot time out.
    """
    return None if generation_timeout_s is None else 2 * generation_timeout_s + 60


def wait_for_all(answers: Sequence[Any], timeout_s: float | None) -> None:
    """Wait until every agent loop worker has answered.

    Args:
        answers: one reference per worker that was asked.
        timeout_s: seconds after which a worker counts as blocked; None waits for ever.

    Raises:
        RuntimeError: some are blocked.
    """
    answered, missing = ray.wait(list(answers), num_returns=len(answers), timeout=timeout_s)
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(answers)} agent loop workers have not answered for {timeout_s:.0f} s. {BLOCKED}"
        )
    ray.get(answered)


class Reports(Protocol):
    """Where the buffer learns that groups have ended."""

    def wait(self, timeout_s: float) -> list[GroupReport]:
        """What ended since the last call; waits up to `timeout_s` seconds for the first. Empty if nothing did."""
        ...

    def abort(self, uids: list[str]) -> None:
        """Ask for these groups to be given up; each still reports its end."""
        ...


class WorkerReports:
    """The reports of `StalenessAgentLoopWorker` actors.

    Args:
        workers: actor handles.
        answer_timeout_s: seconds without an answer after which a worker counts as blocked; None waits for ever. A
            worker that has nothing to report answers within `agent_loop.REPORT_WAIT_S`.
    """

    def __init__(self, workers: Sequence[Any], answer_timeout_s: float | None = None) -> None:
        self._workers = list(workers)
        self._answer_timeout_s = answer_timeout_s
        self._questions: dict[Any, tuple[int, float]] = {}
        for index in range(len(self._workers)):
            self._ask(index)

    def _ask(self, index: int) -> None:
        self._questions[self._workers[index].take_reports.remote()] = (index, time.monotonic())

    def wait(self, timeout_s: float) -> list[GroupReport]:
        """See `Reports.wait`.

        Raises:
            RuntimeError: a worker died, and the groups that it was generating are gone; or it is blocked.
        """
        answered, _ = ray.wait(list(self._questions), num_returns=1, timeout=timeout_s)
        if answered:  # whoever else has answered by now comes along
            answered, _ = ray.wait(list(self._questions), num_returns=len(self._questions), timeout=0)
        reports = []
        for question in answered:
            index, _ = self._questions.pop(question)
            try:
                reports.extend(ray.get(question))
            except RayActorError as error:
                raise RuntimeError(f"agent loop worker {index} of {len(self._workers)} died: {error}") from error
            self._ask(index)
        self._check_that_none_is_blocked()
        return reports

    def _check_that_none_is_blocked(self) -> None:
        if self._answer_timeout_s is None:
            return
        for index, asked_at in self._questions.values():
            if time.monotonic() - asked_at > self._answer_timeout_s:
                raise RuntimeError(
                    f"agent loop worker {index} of {len(self._workers)} has not answered for "
                    f"{self._answer_timeout_s:.0f} s. {BLOCKED}"
                )

    def depend_on(self, actors: Sequence[Any]) -> None:
        """Tell every worker which actors the run cannot go on without.

        Raises:
            RuntimeError: a worker is blocked.
        """
        wait_for_all([worker.depend_on.remote(list(actors)) for worker in self._workers], self._answer_timeout_s)

    def journal_to(self, journal: Journal) -> None:
        """Let every worker write its finished groups into the present segment of `journal` from now on.

        Raises:
            JournalError: what a worker writes cannot be seen here.
            RuntimeError: a worker is blocked.
        """
        paths = [journal.rows_path(index) for index in range(len(self._workers))]
        begun = [
            worker.journal_to.remote(str(path), journal.fsync)
            for worker, path in zip(self._workers, paths, strict=True)
        ]
        wait_for_all(begun, self._answer_timeout_s)
        if missing := [path for path in paths if not path.exists()]:
            raise JournalError(
                f"{missing[0]} was written by an agent loop worker and is not there: journal_path must be on a "
                "filesystem that all nodes share"
            )

    def abort(self, uids: list[str]) -> None:
        """Tell every worker to stop generating these groups; those that it does not have are ignored."""
        for worker in self._workers:
            worker.abort_groups.remote(uids)
