"""What a batch shows of its groups, and what of a group is imitated: from tensors to what the rules know, and back."""

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_to_nested

from verl_m2po.staleness.rule.reusing import Reusing
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.worth import Outcome

FIELDS = ("uid", "rm_scores", "advantages", "response_mask")


@dataclass(frozen=True)
class Batch:
    """What is read of a batch whose advantages are known.

    Args:
        uids: group of each row.
        scores: [rows], before any penalty.
        advantages: [rows, response].
        response_mask: bool [rows, response].
    """

    uids: Sequence[str]
    scores: Tensor
    advantages: Tensor
    response_mask: Tensor

    def successes(self) -> Tensor:
        """bool [rows]: the score is above 0, and so is the advantage, as the mean of the row's tokens."""
        return (self.scores > 0) & ((self.advantages * self.response_mask).sum(-1) > 0)

    def outcomes(self) -> dict[str, Outcome]:
        """By group."""
        has_advantage = ((self.advantages != 0) & self.response_mask).any(-1).tolist()
        scores, successes = self.scores.tolist(), self.successes().tolist()
        rows: dict[str, list[int]] = defaultdict(list)
        for row, uid in enumerate(self.uids):
            rows[uid].append(row)
        return {
            uid: Outcome(
                mean_score=sum(scores[row] for row in members) / len(members),
                has_advantage=any(has_advantage[row] for row in members),
                has_success=any(successes[row] for row in members),
                has_score=any(scores[row] > 0 for row in members),
            )
            for uid, members in rows.items()
        }

    def imitated(self, replayed: Set[str], baseline: float | None, weight: float) -> tuple[Tensor, Tensor]:
        """Advantages and response mask where of a group that is trained again only the successes are.

        Args:
            replayed: groups that were trained before.
            baseline: the advantage of those is their score above it, and a row that is not above it is left out; None
                leaves advantages as they are.
            weight: of their advantages.
        """
        again = torch.tensor([uid in replayed for uid in self.uids], device=self.scores.device)
        is_left_out = again & ~self.successes()
        advantages = self.advantages
        if baseline is not None:
            above = self.scores - baseline
            is_left_out |= again & (above <= 0)
            advantages = torch.where(again[:, None], above[:, None].to(advantages.dtype), advantages)
        advantages = torch.where(again[:, None], weight * advantages, advantages)
        mask = self.response_mask & ~is_left_out[:, None]
        return advantages * mask, mask

    def judged(self, rule: Reusing, replayed: Set[str], step: int) -> tuple[Tensor, Tensor] | None:
        """Tell `rule` what the batch of trainer step `step` has shown.

        Returns:
            Advantages and response mask where they change: under `positive`, when something is trained again.
        """
        rule.judge(self.outcomes())
        if rule.pool.reuse.sampling != "positive" or not replayed:
            return None
        recalibration = rule.recalibration
        return self.imitated(replayed, recalibration.baseline(), recalibration.imitation.weight(step))


def judge(batch: KVBatchMeta, rule: StalenessRule, replayed: Set[str], step: int) -> KVBatchMeta:
    """The same for a batch in TransferQueue, whose fields are changed there; nothing for a rule that need not know."""
    if not rule.needs_outcomes:
        return batch
    assert isinstance(rule, Reusing)
    partition = batch.partition_id
    assert partition is not None
    data = tq.kv_batch_get(keys=batch.keys, partition_id=partition, select_fields=list(FIELDS))
    nested_mask = data["response_mask"]
    column: Any = data["uid"]
    uids = list(column)
    padded = data.select("rm_scores", "advantages", "response_mask").to_padded_tensor()
    seen = Batch(uids, padded["rm_scores"].sum(-1), padded["advantages"], padded["response_mask"].bool())
    changed = seen.judged(rule, replayed, step)
    if changed is None:
        return batch
    advantages, mask = changed
    fields = {
        "advantages": response_to_nested(advantages, nested_mask),
        "response_mask": response_to_nested(mask.to(nested_mask.dtype), nested_mask),
    }
    columns = TensorDict(fields, batch_size=len(uids))
    return tq.kv_batch_put(keys=batch.keys, partition_id=partition, fields=columns)
