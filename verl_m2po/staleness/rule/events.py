"""What happens to prompt groups: the buffer tells every listener, in the order in which it happens. Plain data."""

from dataclasses import dataclass
from typing import Protocol

from verl_m2po.staleness.rule.records import Group, GroupReport, Selection, Ticket


@dataclass(frozen=True, slots=True)
class Resumed:
    """A run starts, or starts again, from weight `version`: 0 without a checkpoint."""

    version: int


@dataclass(frozen=True, slots=True)
class Began:
    """Training begins; the time before, as that of starting the rollout servers, belongs to no trainer step."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Groups are about to be generated with the present weights; `again`: once more, since they were lost."""

    tickets: tuple[Ticket, ...]
    again: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """Every trajectory of `group` is there, or masked, and it waits to be trained; `report` says how it ended."""

    group: Group
    report: GroupReport


@dataclass(frozen=True, slots=True)
class Returned:
    """A group that was generated before a restart waits to be trained: the run has come to its weights again."""

    group: Group


@dataclass(frozen=True, slots=True)
class Failed:
    """A group failed, or was aborted; its place is free again."""

    ticket: Ticket
    report: GroupReport


@dataclass(frozen=True, slots=True)
class Lost:
    """Servers died under a group until it was given up; it is still in flight, and is generated again."""

    ticket: Ticket
    report: GroupReport


@dataclass(frozen=True, slots=True)
class SetAside:
    """All trajectories of a group are there and equally good: the group has no advantage, and its place is free again.

    The group has not failed; `report.shared_metric` is the value that its trajectories share.
    """

    ticket: Ticket
    report: GroupReport


@dataclass(frozen=True, slots=True)
class Evicted:
    """Finished groups that will never be trained."""

    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """A batch, or a mini-batch, is handed out.

    Args:
        step: trainer step, from 1.
        version: weight version that training starts from.
        selection: what is trained.
    """

    step: int
    version: int
    selection: Selection


@dataclass(frozen=True, slots=True)
class Advanced:
    """The rollout holds weight `version` from now on."""

    version: int


@dataclass(frozen=True, slots=True)
class TrainerWaited:
    """The trainer had nothing to do but to wait for rollouts, for so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class GeneratorIdle:
    """No group is in flight since `since`, in seconds since the epoch."""

    since: float


@dataclass(frozen=True, slots=True)
class ServersChanged:
    """Rollout servers died, or took the place of others, at these moments: seconds since the epoch."""

    lost_at: tuple[float, ...]
    joined_at: tuple[float, ...]


Event = (
    Resumed
    | Began
    | Dispatched
    | Finished
    | Returned
    | Failed
    | Lost
    | SetAside
    | Evicted
    | Trained
    | Advanced
    | TrainerWaited
    | GeneratorIdle
    | ServersChanged
)


class Listener(Protocol):
    """Keeps an account of a run, or ends it. It decides nothing about groups."""

    def on_event(self, event: Event) -> None:
        """Take note of `event`; a listener ignores the events that it does not need."""
        ...
