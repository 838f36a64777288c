"""Waiting rollouts on disk: TransferQueue's own offload, with the settings that our preflight names."""

import random
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorStack
from verl.utils.tensordict_utils import list_of_dict_to_tensordict, maybe_fix_3d_position_ids
from verl_rows import seeing, verl_row

from verl_m2po.staleness.rollout.scoring import take_probe
from verl_m2po.staleness.rows import codec, media
from verl_m2po.staleness.rows.store import LotStore, batch_of, lot_partition, training_partition
from verl_m2po.staleness.rule.records import Group, Row, Ticket

pytestmark = pytest.mark.ray

LONG, SHORT = 2000, 20


@pytest.fixture
def folder(cluster, tmp_path: Path):
    """Where a real TransferQueue keeps what is larger than 1,024 bytes."""
    import transfer_queue as tq
    from omegaconf import OmegaConf

    offload = {"enabled": True, "path": str(tmp_path), "threshold_bytes": 1024}
    tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1, "ssd_offload": offload}}}))
    yield tmp_path
    tq.close()


def on_disk(folder: Path) -> int:
    """Bytes under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*.bin"))


def store_with_a_prompt() -> tuple[LotStore, Ticket]:
    store, ticket = LotStore(), Ticket("g", 0, 0, 0)
    prompts = TensorDict({"uid": NonTensorStack("g"), "index": torch.tensor([7])}, batch_size=[1])
    store.put_prompts([ticket], prompts)
    return store, ticket


def test_long_responses_wait_on_disk_and_come_back_as_they_were(folder):
    import transfer_queue as tq

    rng = random.Random(0)
    store, ticket = store_with_a_prompt()
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
    probe = take_probe(batch, ranks=2)
    assert probe is not None and probe.prompt_tokens == [3, 3], "without images rows can be compared with the rollout"
    store.delete([(ticket, tuple(rows))])
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id)
    for key in ("responses", "rollout_log_probs", "response_mask", "input_ids", "rm_scores"):
        for row, found in zip(fields, data[key].unbind(), strict=True):
            torch.testing.assert_close(found, row[key], rtol=0, atol=0)
    tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    assert on_disk(folder) == 0, "what was trained leaves the disk"


@pytest.mark.parametrize("lengths", [(5, 9, 2), (4, 4, 4)])
def test_an_image_waits_on_disk_once_for_its_group_and_every_row_comes_back_as_verl_has_it(folder, lengths):
    import transfer_queue as tq

    store, ticket = store_with_a_prompt()
    # Of 16 x 16 patches; the last row has a further one, of a tool.
    pixels, grid = torch.rand(256, 96), torch.tensor([[1, 16, 16]])
    seen = {"pixel_values": pixels, "image_grid_thw": grid}
    more = {"pixel_values": torch.cat([pixels, -pixels]), "image_grid_thw": torch.cat([grid, grid])}
    fields = [
        seeing(verl_row([1, 2, 3], [7] * tokens, [1] * tokens), more if i == 2 else seen, jumps_at=2)
        for i, tokens in enumerate(lengths)
    ]
    rows = tuple(Row(f"g_{i}_0", 3, tokens, ((0, tokens),)) for i, tokens in enumerate(lengths))
    pool = media.Pool()
    for row, of_row in zip(rows, fields, strict=True):  # each session by itself
        packed = list_of_dict_to_tensordict([codec.pack(of_row, row.key, pool)])
        tq.kv_batch_put(keys=[row.key], fields=packed, partition_id=lot_partition(0))
    assert 2 * pixels.nbytes <= on_disk(folder) < 2 * pixels.nbytes + 4096, "the prompt's once, and the tool's"

    groups = (Group(ticket, rows),)
    store.unpack(groups, None, training_partition(0))
    assert take_probe(batch_of(groups, training_partition(0)), ranks=2) is None
    ours = tq.kv_batch_get(keys=[row.key for row in rows], partition_id=training_partition(0))
    tq.kv_batch_put(keys=["a", "b", "c"], fields=list_of_dict_to_tensordict(fields), partition_id="verls")
    verls = tq.kv_batch_get(keys=["a", "b", "c"], partition_id="verls")
    for data in (ours, verls):
        maybe_fix_3d_position_ids(data)
    _assert_same_positions(ours["position_ids"], verls["position_ids"])
    for found, expected in zip(ours["multi_modal_inputs"], verls["multi_modal_inputs"], strict=True):
        found, expected = (getattr(each, "data", each) for each in (found, expected))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)

    store.delete([(ticket, rows)])
    store.delete_unpacked(groups, training_partition(0))
    tq.kv_clear(keys=["a", "b", "c"], partition_id="verls")
    assert on_disk(folder) == 0, "what was trained leaves the disk"


def _assert_same_positions(ours: torch.Tensor, verls: torch.Tensor) -> None:
    """Jagged, or dense where verl's are: of rows that all have one length."""
    assert ours.is_nested and ours.dim() == verls.dim() == 3
    if verls.is_nested:
        assert torch.equal(ours.offsets(), verls.offsets())
        assert torch.equal(ours.values(), verls.values())
    else:
        assert torch.equal(torch.stack(list(ours.unbind())), verls)
