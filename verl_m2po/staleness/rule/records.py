"""What the rules know about a prompt group: no tokens, only counts and weight versions. Plain data, plain JSON."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One trajectory of a finished group.

    Args:
        key: TransferQueue key.
        prompt_tokens: length of the prompt.
        response_tokens: length of the response, tool tokens included.
        spans: (weight version, generated tokens) in the order of generation; only versions that generated a token.
            In a masked row the versions are those of the row that it copies, and all have 0 tokens.
    """

    key: str
    prompt_tokens: int
    response_tokens: int
    spans: tuple[tuple[int, int], ...]

    @property
    def min_version(self) -> int:
        """Weight version of the oldest generated token."""
        return min(version for version, _ in self.spans)

    @property
    def max_version(self) -> int:
        """Weight version of the newest generated token."""
        return max(version for version, _ in self.spans)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated, by all weight versions; 0 in a masked row."""
        return sum(tokens for _, tokens in self.spans)

    @property
    def is_masked(self) -> bool:
        """Whether it stands in for a trajectory that failed, and none of its tokens is trained on."""
        return not self.generated_tokens

    def masked_as(self, key: str) -> "Row":
        """A masked copy under another key. It keeps the weight versions, so that it counts as old as what it copies."""
        return replace(self, key=key, spans=tuple((version, 0) for version, _ in self.spans))

    def tokens_since(self, oldest_version: int) -> int:
        """Generated tokens whose weight version is at least `oldest_version`."""
        return sum(tokens for version, tokens in self.spans if version >= oldest_version)

    def to_json(self) -> list[Any]:
        """As plain JSON."""
        return [self.key, self.prompt_tokens, self.response_tokens, [list(span) for span in self.spans]]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Row":
        """From what `to_json` returned."""
        key, prompt_tokens, response_tokens, spans = data
        return cls(key, prompt_tokens, response_tokens, tuple((version, tokens) for version, tokens in spans))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A prompt group that was admitted: one attempt at filling one place of a batch.

    Args:
        uid: verl's group id.
        place: dispatch index. With exact staleness place // batch size is the batch that will train it.
        dispatch_version: weight version of the rollout when it was dispatched.
        lot: number of the TransferQueue partition that holds its rows until they are trained.
        prompt_index: position or name of the prompt in the data set, -1 if unknown; outlives restarts, unlike the uid.
    """

    uid: str
    place: int
    dispatch_version: int
    lot: int
    prompt_index: int | str = -1

    def to_json(self) -> list[Any]:
        """As plain JSON."""
        return [self.uid, self.place, self.dispatch_version, self.lot, self.prompt_index]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Ticket":
        """From what `to_json` returned."""
        return cls(*data)


@dataclass(frozen=True, slots=True)
class Group:
    """A finished prompt group, waiting to be trained."""

    ticket: Ticket
    rows: tuple[Row, ...]

    @property
    def min_version(self) -> int:
        """Weight version of its oldest generated token."""
        return min(row.min_version for row in self.rows)

    @property
    def max_version(self) -> int:
        """Weight version of its newest generated token."""
        return max(row.max_version for row in self.rows)

    @property
    def generated_tokens(self) -> int:
        """Tokens generated in all its rows."""
        return sum(row.generated_tokens for row in self.rows)

    @property
    def tokens_per_response(self) -> float:
        """Mean generated tokens of the trajectories that did not fail."""
        return self.generated_tokens / sum(not row.is_masked for row in self.rows)

    @property
    def masked_share(self) -> float:
        """Share of the trajectories that failed, and were masked."""
        return sum(row.is_masked for row in self.rows) / len(self.rows)

    def usable_share(self, oldest_version: int) -> float:
        """Share of the generated tokens whose weight version is at least `oldest_version`."""
        if self.min_version >= oldest_version:
            return 1.0
        return sum(row.tokens_since(oldest_version) for row in self.rows) / self.generated_tokens

    def to_json(self) -> list[Any]:
        """As plain JSON."""
        return [self.ticket.to_json(), [row.to_json() for row in self.rows]]

    @classmethod
    def from_json(cls, data: list[Any]) -> "Group":
        """From what `to_json` returned."""
        ticket, rows = data
        return cls(Ticket.from_json(ticket), tuple(Row.from_json(row) for row in rows))


@dataclass(frozen=True, slots=True)
class Selection:
    """What to train on now, and what was given up in choosing it.

    Args:
        groups: the batch, in the order in which it is trained.
        oldest_version: tokens of an older weight version than this must be masked; None if there are no such tokens.
        evicted: groups that can no longer be used, and were never trained; their rows must be deleted. Their places are
            free again.
        kept: uids of those of `groups` that may be selected again: their rows stay where they are.
        retired: groups that were trained before and will not be again; their rows must be deleted.
        replayed: uids of those of `groups` that were trained before.
    """

    groups: tuple[Group, ...]
    oldest_version: int | None
    evicted: tuple[Group, ...] = ()
    kept: frozenset[str] = frozenset()
    retired: tuple[Group, ...] = ()
    replayed: frozenset[str] = frozenset()

    @property
    def used_up(self) -> tuple[Group, ...]:
        """Those of `groups` whose rows nothing needs once the batch has been handed out."""
        return tuple(group for group in self.groups if group.ticket.uid not in self.kept)


@dataclass(frozen=True, slots=True)
class GroupReport:
    """How a group in flight ended.

    Args:
        uid: verl's group id.
        rows: its trajectories; on failure those that were stored nevertheless, to be deleted.
        error: None if every trajectory is there, or masked; otherwise the first line of what went wrong.
        was_aborted: it ended because the trainer asked for it.
        was_lost: a process that it needed has died, and it must be generated again.
        deaths: if it was lost, how many processes that are replaced died under it, one after the other; 0: one that is
            not replaced.
        moves: requests that began again elsewhere, since their server had died.
        lost_s: seconds of generation that were lost with these servers, over all its requests.
        generated_tokens: tokens generated in all its trajectories, finished or not.
        responses: how many trajectories it was to have, at least 1.
        began_at: `time.time()` on the worker's machine when the worker took the group up, in seconds.
        finished_at: `time.time()` on that machine when the group ended, in seconds.
        masked_errors: what went wrong with each trajectory that is masked, first lines only.
        shared_metric: all its trajectories have this value of the metric that groups are filtered by, so that it has no
            advantage and is replaced; None where they differ, or nothing is filtered.
    """

    uid: str
    rows: tuple[Row, ...]
    error: str | None = None
    was_aborted: bool = False
    was_lost: bool = False
    deaths: int = 0
    moves: int = 0
    lost_s: float = 0.0
    generated_tokens: int = 0
    responses: int = 1
    began_at: float = 0.0
    finished_at: float = 0.0
    masked_errors: tuple[str, ...] = ()
    shared_metric: float | None = None
