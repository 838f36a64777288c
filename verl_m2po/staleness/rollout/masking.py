"""What stands in for a trajectory that failed, in a group that is trained nevertheless: a sibling's copy, all masked.

verl needs every row of a group: batch shapes, shares of ranks and group sizes count on it. The copy has real tokens,
log-probs and a reward, but an empty response mask, so nothing of it is trained on. Its reward does count in the group's
baseline; because the sibling is drawn at random, the mean of the group is in expectation that of what succeeded.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rule.records import Row


class StoredRow(NamedTuple):
    """One trajectory of a session.

    Args:
        row: what the rules know of it.
        packed: its fields, see codec.py.
    """

    row: Row
    packed: dict[str, Any]


def row_key(uid: str, session_id: int, index: int) -> str:
    """verl's key of the trajectory number `index` of a session; most agent loops return one."""
    return f"{uid}_{session_id}_{index}"


def stand_in(uid: str, session_id: int, succeeded: Mapping[int, Sequence[StoredRow]]) -> list[StoredRow]:
    """Masked copies of all trajectories of a sibling, under the keys of the session that failed.

    Group and session together seed the draw: whatever the order in which the siblings end, it is the same one.

    Args:
        uid: verl's group id.
        session_id: the session that failed.
        succeeded: what the others stored, by session; at least one.
    """
    sibling = random.Random(f"{uid}_{session_id}").choice(sorted(succeeded))
    return [
        StoredRow(row.masked_as(row_key(uid, session_id, index)), codec.masked_copy(packed, session_id))
        for index, (row, packed) in enumerate(succeeded[sibling])
    ]
