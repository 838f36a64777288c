"""The age of each row of a batch, as the actor worker reads it: it measures the mismatch floor at age zero."""

import torch
import transfer_queue as tq
from tensordict import TensorDict
from transfer_queue import KVBatchMeta

from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.staleness.rule.units import UpdateCount, version_at_step


def with_ages(batch: KVBatchMeta, updates: UpdateCount, step: int) -> KVBatchMeta:
    """`batch` with the field `AGE_FIELD`: optimizer updates between the oldest weights that generated a row and now.

    Args:
        batch: the rows of trainer step `step`, with verl's tags, in TransferQueue.
        updates: made so far; those of `step` count as soon as they are made.
        step: from 1.
    """
    assert batch.partition_id is not None
    version = version_at_step(step)
    updates.add(step, 0)  # none so far; trainer.critic_warmup leaves it there
    before = updates.in_step(step)
    ages = [updates.between(tag["min_global_steps"], version) + before for tag in batch.tags]
    return tq.kv_batch_put(batch.keys, batch.partition_id, TensorDict({AGE_FIELD: torch.tensor(ages)}, len(ages)))
