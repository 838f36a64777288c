"""Weights arrive whole, in order, bit for bit, and only as the version that was asked for."""

import pytest
import torch
import transfer_peers

from verl_m2po.cpu.weight_transfer import GlooCheckpointEngine, WeightTransferError, _buckets

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("receivers", [1, 2])
def test_every_receiver_gets_the_same_bits(receivers):
    expected = [
        (name, str(t.dtype), tuple(t.shape), t.double().flatten().tolist()) for name, t in transfer_peers.weights()
    ]
    assert transfer_peers.transfer(receivers, sent_version=7, expected_version=7) == [expected] * receivers


def test_another_version_is_refused():
    (seen,) = transfer_peers.transfer(1, sent_version=6, expected_version=7)
    assert seen == "WeightTransferError: rollout expected weight version 7, the trainer sent 6"


def test_a_peer_that_does_not_come_is_named_soon():
    """As one that dies between `prepare` and the group: the limit of a message would hold the others for minutes."""
    sender = GlooCheckpointEngine(10, is_master=True, timeout_s=10**6, meeting_timeout_s=1)
    master = sender.prepare()
    with pytest.raises(
        WeightTransferError, match=r"of the 3 ranks of a push of weights, \[1, 2\] did not come within 1 s"
    ):
        sender.init_process_group(0, 3, master)


def test_a_peer_that_falls_silent_is_an_error():
    (seen,) = transfer_peers.transfer(1, sent_version=None, expected_version=7, timeout_s=1)
    assert seen.startswith("RuntimeError: ") and "Timed out waiting 1000ms" in seen


def test_only_the_first_trainer_rank_joins():
    trainer, rollout = GlooCheckpointEngine.build_topology(4, 2, [{"host": "127.0.0.1", "port": 1}] + [None] * 5)
    assert trainer["rank"] == [0, -1, -1, -1]
    assert rollout["rank"] == [1, 2]
    assert set(trainer["world_size"] + rollout["world_size"]) == {3}


@pytest.mark.parametrize("bucket_size", [1, 8, 100, 10**9])
def test_buckets_lose_nothing_and_mark_the_end(bucket_size):
    tensors = [(str(i), torch.zeros(i, dtype=torch.uint8)) for i in range(20)]
    buckets = list(_buckets(iter(tensors), bucket_size))
    assert [pair for bucket, _ in buckets for pair in bucket] == tensors
    assert [is_last for _, is_last in buckets] == [False] * (len(buckets) - 1) + [True]
    assert all(len(bucket) == 1 or sum(t.nbytes for _, t in bucket) <= bucket_size for bucket, _ in buckets)


def test_no_weights_still_end():
    assert list(_buckets(iter([]), 10)) == [([], True)]
