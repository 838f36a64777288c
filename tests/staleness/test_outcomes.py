"""What a batch shows of its groups, and what of a group is imitated, against the slow obvious version."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_m2po.staleness.outcomes import Batch

GROUPS, RESPONSES, LENGTH = 4, 3, 5


def a_batch(seed: int) -> Batch:
    """Rewards of 0 and 1 and advantages over the group's mean, with some rows masked."""
    chance = torch.Generator().manual_seed(seed)
    scores = torch.randint(-1, 2, (GROUPS, RESPONSES), generator=chance).float()
    mask = torch.rand(GROUPS * RESPONSES, LENGTH, generator=chance) < 0.7
    mask[::5] = False
    advantages = (scores - scores.mean(-1, keepdim=True)).flatten()[:, None] * mask
    uids = [f"g{i}" for i in range(GROUPS) for _ in range(RESPONSES)]
    order = torch.randperm(len(uids), generator=chance)
    return Batch([uids[i] for i in order], scores.flatten()[order], advantages[order], mask[order])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_outcomes_are_those_of_a_loop_over_the_rows(seed):
    batch = a_batch(seed)
    for uid, seen in batch.outcomes().items():
        rows = [i for i, each in enumerate(batch.uids) if each == uid]
        scores = [batch.scores[i].item() for i in rows]
        tokens = [
            [a for a, kept in zip(batch.advantages[i], batch.response_mask[i], strict=True) if kept] for i in rows
        ]
        assert seen.mean_score == pytest.approx(sum(scores) / len(scores))
        assert seen.has_advantage == any(a != 0 for row in tokens for a in row)
        assert seen.has_success == any(s > 0 and sum(row) > 0 for s, row in zip(scores, tokens, strict=True))
        assert seen.has_score == any(s > 0 for s in scores)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), baseline=st.none() | st.sampled_from([-0.5, 0.0, 0.5, 2.0]))
def test_of_what_is_trained_again_only_successes_are_and_new_groups_are_left_alone(seed, baseline):
    batch, weight = a_batch(seed), 0.25
    advantages, mask = batch.imitated({"g0", "g2"}, baseline, weight)
    for i, uid in enumerate(batch.uids):
        is_success = batch.scores[i] > 0 and batch.advantages[i].sum() > 0
        if uid not in ("g0", "g2"):
            assert torch.equal(advantages[i], batch.advantages[i]) and torch.equal(mask[i], batch.response_mask[i])
        elif not is_success or (baseline is not None and batch.scores[i] <= baseline):
            assert not mask[i].any() and not advantages[i].any()
        else:
            assert torch.equal(mask[i], batch.response_mask[i])
            worth = batch.advantages[i] if baseline is None else (batch.scores[i] - baseline) * mask[i]
            assert torch.allclose(advantages[i], weight * worth)
