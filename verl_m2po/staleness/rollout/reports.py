"""Waiting for groups to end, without polling: one open question per agent loop worker."""

import time
from collections.abc import Callable, Sequence
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


def wait_for_all(answers: Sequence[Any], timeout_s: float | None, may_die: bool = False) -> list[bool]:
    """Wait until every agent loop worker has answered.

    Args:
        answers: one reference per worker that was asked.
        timeout_s: seconds after which a worker counts as blocked; None waits for ever.
        may_die: one that died is no error.

    Returns:
        Of each, whether it has not died.

    Raises:
        RuntimeError: some are blocked.
    """
    missing = ray.wait(list(answers), num_returns=len(answers), timeout=timeout_s)[1]
    if missing:
        raise RuntimeError(
            f"{len(missing)} of {len(answers)} agent loop workers have not answered for {timeout_s:.0f} s. {BLOCKED}"
        )
    return [_lives(answer, may_die) for answer in answers]


def _lives(answer: Any, may_die: bool) -> bool:
    try:
        ray.get(answer)
    except RayActorError:
        if not may_die:
            raise
        return False
    return True


class Pool(Protocol):
    """Who replaces agent loop workers, `manager.StalenessAgentLoopManager`."""

    can_replace: bool

    def ended(self, worker: Any, uids: list[str]) -> None:
        """These groups of `worker` have been reported."""
        ...

    def replace(self, index: int) -> tuple[Any, list[str]]:
        """The worker in the place of a dead one, and the groups that the dead one was generating."""
        ...


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
        pool: replaces those that die; None: a death is an error.
    """

    def __init__(self, workers: Sequence[Any], answer_timeout_s: float | None = None, pool: Pool | None = None) -> None:
        self._workers = list(workers)
        self._answer_timeout_s, self._pool = answer_timeout_s, pool
        # Of the file in the journal: one that a death has cut off is not written to again.
        self._numbers = list(range(len(self._workers)))
        self._told: dict[str, Callable[[int], tuple[Any, ...]]] = {}
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
            reports.extend(self._answer(index, question))
            self._ask(index)
        self._check_that_none_is_blocked()
        return reports

    def _answer(self, index: int, question: Any) -> list[GroupReport]:
        try:
            reports = ray.get(question)
        except RayActorError as error:
            if self._pool is None or not self._pool.can_replace:
                raise RuntimeError(f"agent loop worker {index} of {len(self._workers)} died: {error}") from error
            return self._replace(index, self._pool)
        if self._pool is not None:
            self._pool.ended(self._workers[index], [report.uid for report in reports])
        return reports

    def _replace(self, index: int, pool: Pool) -> list[GroupReport]:
        """Tell the one that takes its place what the others know; the groups that were lost."""
        self._workers[index], lost = pool.replace(index)
        self._numbers[index] = max(self._numbers) + 1
        for method, arguments in self._told.items():
            self._call([index], method, arguments)
        error = "an agent loop worker died"
        return [GroupReport(uid, (), error, was_lost=True, deaths=1) for uid in lost]

    def _tell(self, method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[int]:
        """Call `method` of every worker, and of those that take the place of one later; numbers of those that live."""
        self._told[method] = arguments
        return self._call(range(len(self._workers)), method, arguments)

    def _call(self, indices: Sequence[int], method: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[int]:
        numbers = [self._numbers[index] for index in indices]
        asked = [
            getattr(self._workers[index], method).remote(*arguments(number))
            for index, number in zip(indices, numbers, strict=True)
        ]
        may_die = self._pool is not None and self._pool.can_replace
        lives = wait_for_all(asked, self._answer_timeout_s, may_die)
        return [number for number, answered in zip(numbers, lives, strict=True) if answered]

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
        self._tell("depend_on", lambda _: (list(actors),))

    def journal_to(self, journal: Journal) -> None:
        """Let every worker write its finished groups into the present segment of `journal` from now on.

        Raises:
            JournalError: what a worker writes cannot be seen here.
            RuntimeError: a worker is blocked.
        """
        numbers = self._tell("journal_to", lambda number: (str(journal.rows_path(number)), journal.fsync))
        paths = [journal.rows_path(number) for number in numbers]
        if missing := [path for path in paths if not path.exists()]:
            raise JournalError(
                f"{missing[0]} was written by an agent loop worker and is not there: journal_path must be on a "
                "filesystem that all nodes share"
            )

    def abort(self, uids: list[str]) -> None:
        """Tell every worker to stop generating these groups; those that it does not have are ignored."""
        for worker in self._workers:
            worker.abort_groups.remote(uids)
