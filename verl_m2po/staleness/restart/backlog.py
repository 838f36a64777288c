# pyright: reportAbstractUsage=false
# tensordict's tensor classes are made at run time.
"""Groups that were in flight when a run stopped: each comes back when the run has come to its weights again."""

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack

from verl_m2po.staleness.restart.frames import JournalError
from verl_m2po.staleness.restart.replay import Replay
from verl_m2po.staleness.rows.store import LotStore
from verl_m2po.staleness.rule.records import Group, Ticket
from verl_m2po.staleness.rule.rules import StalenessRule

logger = logging.getLogger(__name__)

Draw = Callable[[int], tuple[list[int | str], TensorDict]]
"""The next prompts of the data set, that many: their names or positions, and the prompts."""


class Backlog:
    """What a restart owes: groups that were generated and arrive later, and groups that are generated again later.

    Args:
        rule: knows what is in flight; nobody waits for what is of weights that are still to come.
        store: their prompts and rows.
    """

    def __init__(self, rule: StalenessRule, store: LotStore) -> None:
        self._rule, self._store = rule, store
        self._arrivals: dict[int, list[Group]] = defaultdict(list)
        self._reissues: dict[int, list[str]] = defaultdict(list)

    def arrived(self, version: int) -> list[Group]:
        """Groups that were generated before the crash and are as old at `version` as they were then; each once."""
        due = sorted(newest for newest in self._arrivals if newest <= version)
        return [group for newest in due for group in self._arrivals.pop(newest)]

    def due_again(self, version: int) -> list[str]:
        """Groups that `version`, or weights before it, had begun to generate; each once."""
        due = sorted(dispatched for dispatched in self._reissues if dispatched <= version)
        return [uid for dispatched in due for uid in self._reissues.pop(dispatched)]

    def state(self) -> list[Any]:
        """What has not arrived yet, as plain JSON. What is to be generated again is in flight in the rule's state."""
        return [group.to_json() for groups in self._arrivals.values() for group in groups]

    def restore(self, state: list[Any]) -> None:
        """Go on from a checkpoint, after the rule has loaded its part and TransferQueue its own.

        Args:
            state: what `state` returned.

        Raises:
            RuntimeError: TransferQueue lacks rows that the run waits for.
        """
        arrivals = [Group.from_json(data) for data in state]
        tickets = self._in_flight_but(arrivals)
        waiting = [*self._rule.stored_groups(), *arrivals]
        deleted = self._store.restore(tickets, waiting)
        for group in arrivals:
            self._expect(group)
        for ticket in tickets:
            self._generate_again(ticket)
        logger.info(
            "restored %d waiting groups, %d to generate again, deleted %d orphan rows",
            len(waiting),
            len(tickets),
            deleted,
        )

    def replay(self, replay: Replay, draw: Draw) -> None:
        """Take back what the journal knows beyond the checkpoint, after `restore`.

        Raises:
            JournalError: the data set gives other prompts than it gave then.
        """
        for kind, what in replay.events:
            if kind == "dispatched":
                self._readmit(what, *draw(len(what)))
            elif kind == "again":
                for ticket in what:
                    self._rule.readmit(ticket)
            else:
                self._store.delete([(self._rule.fail(what), ())])
        self._reissues.clear()
        tickets = self._in_flight_but([group for groups in self._arrivals.values() for group in groups])
        taken = 0
        for ticket in tickets:
            finished = replay.finished.get(ticket.uid)
            if finished is None:
                self._generate_again(ticket)
            else:
                self._store.put_rows(ticket, finished.rows, finished.packed)
                self._expect(Group(ticket, finished.rows))
                taken += 1
        logger.info("the journal gave back %d finished groups, %d are generated again", taken, len(tickets) - taken)

    def _in_flight_but(self, arrivals: list[Group]) -> list[Ticket]:
        arrived = {group.ticket.uid for group in arrivals}
        return [ticket for ticket in self._rule.in_flight_tickets() if ticket.uid not in arrived]

    def _expect(self, group: Group) -> None:
        """`group` arrives when the run has come to the newest weights that generated a token of it."""
        self._arrivals[group.max_version].append(group)
        self._rule.postpone(group.ticket.uid)

    def _generate_again(self, ticket: Ticket) -> None:
        self._reissues[ticket.dispatch_version].append(ticket.uid)
        self._rule.postpone(ticket.uid)

    def _readmit(self, tickets: list[Ticket], indices: list[int | str], prompts: TensorDict) -> None:
        for ticket, index in zip(tickets, indices, strict=True):
            if ticket.prompt_index != index:
                raise JournalError(
                    f"the journal dispatched prompt {ticket.prompt_index} at place {ticket.place}, where the data set "
                    f"now gives prompt {index}: it is another data set, or in another order. Resume with the old one, "
                    "or without the journal (journal=false)"
                )
            self._rule.readmit(ticket)
        prompts["uid"] = NonTensorStack(*[ticket.uid for ticket in tickets])
        self._store.put_prompts(tickets, prompts)
