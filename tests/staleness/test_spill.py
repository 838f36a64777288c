"""Waiting rollouts on disk: TransferQueue's own offload, with the settings that our preflight names."""

import random
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl_rows import verl_row

from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.store import LotStore, batch_of, lot_partition, training_partition
from verl_m2po.staleness.rule.records import Group, Row, Ticket

pytestmark = pytest.mark.ray

LONG, SHORT = 2000, 20


@pytest.fixture
def folder(tmp_path: Path):
    """Where a real TransferQueue keeps what is larger than 1,024 bytes."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, _node_ip_address="127.0.0.1")
    offload = {"enabled": True, "path": str(tmp_path), "threshold_bytes": 1024}
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1, "ssd_offload": offload}}}))
    yield tmp_path
    tq.close()
    ray.shutdown()


def on_disk(folder: Path) -> int:
    """Bytes under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*.bin"))


def test_long_responses_wait_on_disk_and_come_back_as_they_were(folder):
    import transfer_queue as tq

    rng = random.Random(0)
    store = LotStore()
    ticket = Ticket("g", 0, 0, 0)
    prompts = TensorDict({"uid": NonTensorStack("g"), "index": torch.tensor([7])}, batch_size=[1])
    store.put_prompts([ticket], prompts)
    rows, fields = [], []
    for i, tokens in enumerate((LONG, LONG, SHORT)):
        row = verl_row([1, 2, 3], [rng.randrange(1000) for _ in range(tokens)], [1] * tokens)
        fields.append(row)
        rows.append(Row(f"g_{i}_0", 3, tokens, ((0, tokens),)))
    packed = list_of_dict_to_tensordict([codec.pack(row) for row in fields])
    tq.kv_batch_put(keys=[row.key for row in rows], fields=packed, partition_id=lot_partition(0))
    assert on_disk(folder) == 2 * LONG * codec.BYTES_PER_RESPONSE_TOKEN, "what is short stays in memory"

    groups = (Group(ticket, tuple(rows)),)
    store.unpack(groups, None, training_partition(0))
    batch = batch_of(groups, training_partition(0))
    store.delete([(ticket, tuple(rows))])
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    for key in ("responses", "rollout_log_probs", "response_mask", "input_ids", "rm_scores"):
        for row, found in zip(fields, data[key].unbind(), strict=True):
            torch.testing.assert_close(found, row[key], rtol=0, atol=0)
    tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    assert on_disk(folder) == 0, "what was trained leaves the disk"
