"""Waiting for groups to end, without polling: one open question per agent loop worker."""

from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from verl_m2po.staleness.records import GroupReport


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
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self._workers = list(workers)
        self._questions = {worker.take_reports.remote(): index for index, worker in enumerate(self._workers)}

    def wait(self, timeout_s: float) -> list[GroupReport]:
        """See `Reports.wait`.

        Raises:
            RuntimeError: a worker died; the groups that it was generating are gone.
        """
        answered, _ = ray.wait(list(self._questions), num_returns=1, timeout=timeout_s)
        if answered:  # whoever else has answered by now comes along
            answered, _ = ray.wait(list(self._questions), num_returns=len(self._questions), timeout=0)
        reports = []
        for question in answered:
            index = self._questions.pop(question)
            try:
                reports.extend(ray.get(question))
            except RayActorError as error:
                raise RuntimeError(f"agent loop worker {index} of {len(self._workers)} died: {error}") from error
            self._questions[self._workers[index].take_reports.remote()] = index
        return reports

    def abort(self, uids: list[str]) -> None:
        for worker in self._workers:
            worker.abort_groups.remote(uids)
