# pyright: reportAbstractUsage=false
# tensordict's tensor classes are made at run time.
"""The rows of waiting groups in TransferQueue: one partition per lot, so that no operation sees more than its own lot.

TransferQueue's listing and clearing cost time proportional to the partition. verl's own operations work on the
partition of a batch, which here holds what is being trained and nothing else.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import transfer_queue as tq
from tensordict import NonTensorData, TensorDict
from tensordict.tensorclass import NonTensorStack
from transfer_queue import KVBatchMeta
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.ragged import Ragged
from verl_m2po.staleness.rule.records import Group, Row, Ticket

TRAINING_PARTITIONS = ("train", "train_next")
"""Of unpacked rows, trainer step by trainer step in turn: a group may be in the batch that trains and in the next."""

LOT_FIELD = "staleness_lot"
"""Prompt field: the TransferQueue partition of the group. Without it a prompt is verl's own business (validation)."""


def training_partition(version: int) -> str:
    """TransferQueue partition of the batch that trains from weight `version`."""
    return TRAINING_PARTITIONS[version % len(TRAINING_PARTITIONS)]


def lot_partition(lot: int) -> str:
    """TransferQueue partition of a lot."""
    return f"staleness_lot_{lot}"


def _rows_of(data: TensorDict) -> list[dict[str, Any]]:
    """A batch of prompts from TransferQueue, or from the data set, as one dict per row."""
    columns = {key: elements(column) for key, column in data.items()}
    return [{key: column[i] for key, column in columns.items()} for i in range(len(data))]


def elements(column: Any) -> Any:
    """A column of a batch from TransferQueue, row by row: tensors, or what else was put there."""
    if isinstance(column, torch.Tensor):
        return column.unbind()
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _batch(rows: list[dict[str, Any]]) -> TensorDict:
    """One TensorDict of the fields that all rows have; sequences become jagged columns whatever their lengths."""
    columns: dict[str, Any] = {}
    for key in rows[0]:
        if not all(key in row for row in rows):
            continue
        values = [row[key] for row in rows]
        if not all(isinstance(value, torch.Tensor) for value in values):
            columns[key] = NonTensorStack(*values)
        elif values[0].dim():
            columns[key] = torch.nested.as_nested_tensor(values, layout=torch.jagged)
        else:
            columns[key] = torch.stack(values)
    return TensorDict(columns, batch_size=[len(rows)])


def _repeated(columns: TensorDict, times: list[int]) -> dict[str, Any]:
    """Each row of `columns` as often as `times` says. What is not a tensor is wrapped once and shared."""
    counts = torch.tensor(times)
    repeated: dict[str, Any] = {}
    for key, column in columns.items():
        if isinstance(column, NonTensorStack):
            wrapped = [column[i] for i in range(len(times))]
            repeated[key] = NonTensorStack(*[one for one, n in zip(wrapped, times, strict=True) for _ in range(n)])
        elif column.is_nested:
            repeated[key] = Ragged.of(column).take(torch.arange(len(times)).repeat_interleave(counts)).nested()
        else:
            repeated[key] = column.repeat_interleave(counts, dim=0)
    return repeated


def _tag(row: Row, ticket: Ticket) -> dict[str, Any]:
    """verl's tag of a trajectory."""
    return {
        "status": "success",
        "prompt_len": row.prompt_tokens,
        "response_len": row.response_tokens,
        "seq_len": row.prompt_tokens + row.response_tokens,
        "global_steps": ticket.dispatch_version + 1,
        "min_global_steps": row.min_version,
        "max_global_steps": row.max_version,
    }


def batch_of(groups: Sequence[Group], partition: str) -> KVBatchMeta:
    """verl's description of a batch whose rows lie in `partition`, in the order in which they are trained."""
    keys = [row.key for group in groups for row in group.rows]
    tags = [_tag(row, group.ticket) for group in groups for row in group.rows]
    return KVBatchMeta(partition_id=partition, keys=keys, tags=tags)


class LotStore:
    """Puts prompts into lots, takes batches out of them, and deletes what is no longer needed."""

    def __init__(self) -> None:
        self._groups_in_lot: Counter[int] = Counter()

    def put_prompts(self, tickets: list[Ticket], prompts: TensorDict) -> None:
        """Keep the prompts of dispatched groups: to dispatch them again after a restart, and to complete their rows.

        Args:
            tickets: one per row of `prompts`.
            prompts: what the data set gave.
        """
        columns = [key for key, column in prompts.items() if not isinstance(column, NonTensorData)]
        rows_by_lot: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
        for ticket, row in zip(tickets, _rows_of(prompts.select(*columns)), strict=True):
            rows_by_lot[ticket.lot][ticket.uid] = row
        for lot, rows in rows_by_lot.items():
            tq.kv_batch_put(keys=list(rows), partition_id=lot_partition(lot), fields=_batch(list(rows.values())))
            self._groups_in_lot[lot] += len(rows)

    def put_rows(self, ticket: Ticket, rows: tuple[Row, ...], packed: tuple[dict[str, Any], ...]) -> None:
        """Put back the rows of a finished group, as its agent loop worker wrote them.

        Args:
            packed: fields of each row, see codec.py.
        """
        fields = list_of_dict_to_tensordict([dict(row) for row in packed])
        tq.kv_batch_put(keys=[row.key for row in rows], partition_id=lot_partition(ticket.lot), fields=fields)

    def get_prompts(self, tickets: list[Ticket]) -> TensorDict:
        """The prompts of `tickets`, in their order."""
        rows: dict[str, dict[str, Any]] = {}
        for lot, uids in self._uids_by_lot(tickets).items():
            data = tq.kv_batch_get(keys=uids, partition_id=lot_partition(lot))
            rows |= dict(zip(uids, _rows_of(data), strict=True))
        return _batch([rows[ticket.uid] for ticket in tickets])

    @staticmethod
    def _uids_by_lot(tickets: Iterable[Ticket]) -> dict[int, list[str]]:
        per_lot: dict[int, list[str]] = defaultdict(list)
        for ticket in tickets:
            per_lot[ticket.lot].append(ticket.uid)
        return per_lot

    def unpack(self, groups: Sequence[Group], oldest_version: int | None, partition: str) -> frozenset[str]:
        """Put the rows of `groups` into `partition` as verl trains from them; their lots keep them.

        Args:
            groups: in any order: a batch names its rows.
            oldest_version: tokens of an older weight version are masked; None masks none.
            partition: see `training_partition`.

        Returns:
            The fields of the rows.
        """
        rows = [row for group in groups for row in group.rows]
        over_age = None
        if oldest_version is not None:
            over_age = codec.OverAge([row.spans for row in rows], oldest_version)
        columns = self._shared_columns(groups) | {
            key: column if isinstance(column, torch.Tensor) else NonTensorStack(*column)
            for key, column in codec.unpack(self._packed_columns(groups), over_age, [row.key for row in rows]).items()
        }
        batch = batch_of(groups, partition)
        fields = TensorDict(columns, batch_size=[len(rows)])
        tq.kv_batch_put(keys=batch.keys, partition_id=partition, fields=fields, tags=batch.tags)
        return frozenset(columns)

    @staticmethod
    def delete_unpacked(groups: Sequence[Group], partition: str) -> None:
        """Delete from `partition` what `unpack` put there."""
        tq.kv_clear(keys=batch_of(groups, partition).keys, partition_id=partition)

    @staticmethod
    def _packed_columns(groups: Sequence[Group]) -> dict[str, Ragged | list]:
        """The stored columns of the groups' rows, in the order of `groups`. A field that some rows lack is left out."""
        places: dict[int, list[int]] = defaultdict(list)
        keys: dict[int, list[str]] = defaultdict(list)
        place = 0
        for group in groups:
            keys[group.ticket.lot].extend(row.key for row in group.rows)
            places[group.ticket.lot].extend(range(place, place + len(group.rows)))
            place += len(group.rows)
        parts = [tq.kv_batch_get(keys=keys[lot], partition_id=lot_partition(lot)) for lot in keys]
        order = torch.tensor([place for lot in keys for place in places[lot]]).argsort()
        columns: dict[str, Ragged | list] = {}
        for key in set.intersection(*(set(part.keys()) for part in parts)):
            if isinstance(parts[0][key], torch.Tensor):
                column = Ragged.join([Ragged.of(part[key]) for part in parts])
                columns[key] = column if len(parts) == 1 else column.take(order)
            else:
                listed = [element for part in parts for element in elements(part[key])]
                columns[key] = [listed[i] for i in order.tolist()]
        return columns

    def _shared_columns(self, groups: Sequence[Group]) -> dict[str, Any]:
        """What the data set gave each group, once per row."""
        prompts = self.get_prompts([group.ticket for group in groups])
        prompts["global_steps"] = NonTensorStack(*[group.ticket.dispatch_version + 1 for group in groups])
        return _repeated(prompts, [len(group.rows) for group in groups])

    def delete(self, groups: list[tuple[Ticket, tuple[Row, ...]]]) -> None:
        """Delete groups with their rows; a lot that becomes empty goes as a whole."""
        per_lot: dict[int, list[tuple[Ticket, tuple[Row, ...]]]] = defaultdict(list)
        for ticket, rows in groups:
            per_lot[ticket.lot].append((ticket, rows))
        for lot, members in per_lot.items():
            self._groups_in_lot[lot] -= len(members)
            if self._groups_in_lot[lot] > 0:
                keys = [key for ticket, rows in members for key in (ticket.uid, *(row.key for row in rows))]
                tq.kv_clear(keys=keys, partition_id=lot_partition(lot))
            else:
                del self._groups_in_lot[lot]
                tq.get_client().clear_partition(lot_partition(lot))

    @staticmethod
    def delete_rows(ticket: Ticket) -> None:
        """Delete what there is of the rows of a group in flight, and keep its prompt. Lists the whole lot."""
        partition = lot_partition(ticket.lot)
        listed = tq.kv_list(partition).get(partition, {})
        if rows := [key for key in listed if key.startswith(f"{ticket.uid}_")]:
            tq.kv_clear(keys=rows, partition_id=partition)

    def restore(self, tickets: list[Ticket], ready: list[Group]) -> int:
        """Bring TransferQueue in line with a checkpoint of the rule: what the rule does not know is deleted.

        A checkpoint is written while the batch that was just trained is still in TransferQueue, and while other groups
        are being generated; their half-finished rows are worth nothing.

        Returns:
            How many rows were deleted.

        Raises:
            RuntimeError: rows that the rule waits for are missing.
        """
        known = {ticket.uid for ticket in tickets}
        for group in ready:
            known |= {group.ticket.uid, *(row.key for row in group.rows)}
        partitions = tq.kv_list()
        deleted = 0
        for partition, rows in partitions.items():
            # A group that may be trained again is known, and so is its key; the copy that was trained is not needed.
            kept = frozenset() if partition in TRAINING_PARTITIONS else known
            if orphans := [key for key in rows if key not in kept]:
                tq.kv_clear(keys=orphans, partition_id=partition)
                deleted += len(orphans)
        lots = {name: rows for name, rows in partitions.items() if name not in TRAINING_PARTITIONS}
        if missing := known - {key for rows in lots.values() for key in rows}:
            raise RuntimeError(
                f"the checkpoint lacks {len(missing)} of {len(known)} buffered rows, first {sorted(missing)[0]}: "
                "it is incomplete. Resume from an earlier one"
            )
        self._groups_in_lot = Counter(ticket.lot for ticket in tickets)
        self._groups_in_lot.update(group.ticket.lot for group in ready)
        return deleted
