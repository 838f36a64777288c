"""Masked copies in verl's own arithmetic: finite, nothing of them trained on, the baseline that of what succeeded."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import agg_loss
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl_rows import verl_row

import verl_m2po.advantages  # noqa: F401
from verl_m2po.staleness.checks.failed_trajectories import BEST_OF_A_GROUP
from verl_m2po.staleness.rollout.masking import StoredRow, stand_in
from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.ragged import Ragged
from verl_m2po.staleness.rule.records import Row

REWARDS = (0.0, 1.0, 0.25, 0.75)


def stored(uid: str, session_id: int, outputs: int = 1) -> list[StoredRow]:
    """What a session has stored: `session_id` + 2 response tokens, of version 3 + `session_id`."""
    tokens = session_id + 2
    row = verl_row([1, 2], list(range(tokens)), [1] * tokens, REWARDS[session_id]) | {"session_id": session_id}
    keys = [f"{uid}_{session_id}_{index}" for index in range(outputs)]
    return [StoredRow(Row(key, 2, tokens, ((3 + session_id, tokens),)), codec.pack(row)) for key in keys]


def batch_of(*groups: tuple[str, set[int]], outputs: int = 1) -> tuple[list[str], DataProto]:
    """Keys and verl's padded batch of groups, each with its uid and the sessions that failed."""
    rows: list[StoredRow] = []
    for uid, failed in groups:
        sessions = {i: stored(uid, i, outputs) for i in range(len(REWARDS)) if i not in failed}
        sessions |= {i: stand_in(uid, i, sessions) for i in failed}
        rows += [row for i in range(len(REWARDS)) for row in sessions[i]]
    columns = {
        key: Ragged(torch.cat([row.packed[key] for row in rows]), torch.tensor([len(row.packed[key]) for row in rows]))
        for key in rows[0].packed.keys() - {"rest"}
    }
    fields = codec.unpack(columns | {"rest": [row.packed["rest"] for row in rows]})
    batch = {key: fields[key].to_padded_tensor(0) for key in ("response_mask", "rm_scores", "rollout_log_probs")}
    batch["token_level_rewards"] = batch["rm_scores"]
    keys = [row.row.key for row in rows]
    uids = np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object)
    return keys, DataProto.from_dict(batch, non_tensors={"uid": uids})


def advantages_of(keys: list[str], data: DataProto, estimator: str, **config) -> torch.Tensor:
    settings = OmegaConf.create({"norm_adv_by_std_in_grpo": True, "gamma": 1.0} | config)
    result = compute_advantage_for_multi_trajectories(
        data,
        keys,
        adv_estimator=estimator,
        config=settings,
        norm_adv_by_std_in_grpo=settings.norm_adv_by_std_in_grpo,
    )
    return result.batch["advantages"]


ESTIMATORS = (
    "grpo",
    "grpo_vectorized",
    "rloo",
    "rloo_vectorized",
    "opo",
    "gpg",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "asymre",
    "oapl",
    "red_drop",
    "red_weight",
)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_estimator_gives_a_masked_copy_an_advantage_or_a_nan(estimator, outputs):
    keys, data = batch_of(("a", {1}), ("b", {0, 2, 3}), ("c", set()), outputs=outputs)
    mask = data.batch["response_mask"].bool()
    is_copy = ~mask.any(-1)
    assert is_copy.sum() == 4 * outputs and len(set(keys)) == 12 * outputs
    advantages = advantages_of(keys, data, estimator)
    assert advantages.isfinite().all() and not advantages[~mask].any() and advantages[mask].any()


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"])
def test_no_aggregation_trains_on_a_masked_copy(mode):
    keys, data = batch_of(("a", {1}), ("b", {0, 2}))
    mask = data.batch["response_mask"].bool()
    log_prob = data.batch["rollout_log_probs"].clone().requires_grad_()
    ratio = (log_prob - data.batch["rollout_log_probs"]).exp()
    loss = agg_loss(
        -advantages_of(keys, data, "grpo") * ratio,
        mask,
        mode,
        dp_size=1,
        batch_num_tokens=int(mask.sum()),
        global_batch_size=len(keys),
    )
    loss.backward()
    assert loss.isfinite() and log_prob.grad.isfinite().all()
    assert not log_prob.grad[~mask].any() and log_prob.grad[mask].any()


def test_the_baseline_is_in_expectation_that_of_what_succeeded():
    """GRPO without the standard deviation: advantage plus the mean of the successes is the reward, on average."""
    failed, groups = {1}, 600
    succeeded = [i for i in range(len(REWARDS)) if i not in failed]
    keys, data = batch_of(*[(f"u{number}", failed) for number in range(groups)])
    advantages = advantages_of(keys, data, "grpo", norm_adv_by_std_in_grpo=False)[:, 0].view(groups, -1).mean(0)
    mean = sum(REWARDS[i] for i in succeeded) / len(succeeded)
    expected = [REWARDS[i] - mean for i in succeeded]
    assert advantages[succeeded].tolist() == pytest.approx(expected, abs=0.01)  # 3 standard errors: 0.0095


def test_a_group_with_one_success_has_no_advantage():
    keys, data = batch_of(("a", {0, 2, 3}))
    assert not advantages_of(keys, data, "grpo").any()


def test_the_best_of_a_group_would_be_lost_to_its_own_copy():
    """Why the preflight refuses these two: verl's pass@k finds no second best below it, max@k gives half away."""
    uid = next(
        f"u{number}"
        for number in range(100)
        if stand_in(f"u{number}", 0, {i: stored("u", i) for i in (1, 2, 3)})[0].row.min_version == 4
    )
    for estimator, config in (("grpo_passk", {}), ("max_at_k", {"max_at_k": {"k": 2}})):
        assert estimator in BEST_OF_A_GROUP
        keys, data = batch_of((uid, {0}))
        with_copy = advantages_of(keys, data, estimator, **config)[1, 0]
        keys, data = batch_of((uid, set()))
        alone = advantages_of(keys, data, estimator, **config)[1, 0]
        assert with_copy < 0.6 * alone
