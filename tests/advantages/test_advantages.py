"""The advantage estimators: reference values, laws, and the way verl calls them."""

import itertools
import math

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close
from verl import DataProto
from verl.trainer.ppo.core_algos import compute_grpo_passk_outcome_advantage, get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage

import verl_m2po.advantages  # noqa: F401
from verl_m2po.advantages.max_at_k import leave_one_out_baseline, max_at_k_weights
from verl_m2po.advantages.oapl import soft_value

NAMES = ["asymre", "max_at_k", "oapl", "red_drop", "red_weight"]


def estimate(name: str, groups: list[list[float]], config: dict | None = None) -> list[list[float]]:
    """Advantages of `groups` of rewards, rows interleaved, through the registered function."""
    rows = sorted((i, g, r) for g, rewards in enumerate(groups) for i, r in enumerate(rewards))
    rewards = torch.zeros(len(rows), 3, dtype=torch.float64)
    rewards[:, 1] = torch.tensor([reward for _, _, reward in rows])
    mask = torch.tensor([[1, 1, 0]]).expand(len(rows), 3)
    advantages, returns = get_adv_estimator_fn(name)(
        token_level_rewards=rewards,
        response_mask=mask,
        index=np.array([f"group {g}" for _, g, _ in rows], dtype=object),
        config=OmegaConf.create(config or {}),
    )
    assert advantages.shape == rewards.shape and torch.equal(advantages, returns)
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and (advantages[:, 2] == 0).all()
    result: list[list[float]] = [[] for _ in groups]
    for (_, g, _), value in zip(rows, advantages[:, 0].tolist(), strict=True):
        result[g].append(value)
    return result


@pytest.mark.parametrize("name", NAMES)
def test_verl_reaches_it_by_name_with_its_own_settings(name):
    batch = {
        "token_level_rewards": torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.5]]),
        "response_mask": torch.ones(4, 2),
    }
    data = DataProto.from_dict(batch, non_tensors={"uid": np.array(["a", "a", "b", "b"], dtype=object)})
    config = OmegaConf.create({"max_at_k": {"k": 2}})
    result = compute_advantage(data, adv_estimator=name, config=config)
    assert result.batch["advantages"].shape == (4, 2) and result.batch["advantages"].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_groups_do_not_touch_each_other(name):
    config = {"max_at_k": {"k": 2}}
    first, second = [0.0, 1.0, 0.25, 0.0], [1.0, 1.0, 0.5]
    together = estimate(name, [first, second], config)
    assert together[0] == pytest.approx(estimate(name, [first], config)[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_one(name):
    assert np.isfinite(estimate(name, [[0.7]], {"max_at_k": {"k": 1}})).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reward", [1.0, 0.1, 0.3, -0.9, 1e30])
def test_a_group_of_equal_rewards_has_no_advantage_of_either_sign(name, reward):
    """In float32, as verl has rewards, the mean of seven 0.1 is not 0.1."""
    config = OmegaConf.create({"asymre": {"baseline_shift": 0.0}})
    for responses in range(2, 17):
        rewards = torch.full((responses, 1), reward)
        estimator = get_adv_estimator_fn(name)
        advantages, _ = estimator(rewards, torch.ones_like(rewards), ["a"] * responses, config=config)
        assert (advantages == 0).all(), responses


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_infinite_rewards_is_left_for_the_check_of_the_batch(name):
    rewards = torch.full((4, 1), torch.inf)
    advantages, _ = get_adv_estimator_fn(name)(rewards, torch.ones_like(rewards), ["a"] * 4)
    assert not advantages.isfinite().any()


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_is_missing_is_refused(name):
    with pytest.raises(ValueError, match="need the group of each of the 2 responses, got none"):
        get_adv_estimator_fn(name)(torch.zeros(2, 3), torch.ones(2, 3), None)


def test_soft_value_reference():
    half = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    values = [soft_value(half, beta1).item() for beta1 in (1.0, 1e-3, 1e3)]
    assert values == pytest.approx([0.357374, 0.998614, 0.250094], abs=1e-6)
    assert soft_value(torch.ones(4), 1.0).item() == pytest.approx(1.0)
    assert soft_value(half, math.inf).item() == 0.25


def test_oapl_is_the_reward_minus_the_soft_value():
    assert estimate("oapl", [[0, 0, 1, 0]])[0] == pytest.approx([-0.357374, -0.357374, 0.642626, -0.357374], abs=1e-6)
    # The fixed point's policy is normalised: the mean of exp(A / beta1) is 1.
    advantages = estimate("oapl", [[0.3, 2.0, -1.0]], {"oapl": {"beta1": 0.5}})[0]
    assert sum(math.exp(a / 0.5) for a in advantages) / 3 == pytest.approx(1)


def test_asymre_shifts_the_baseline():
    rewards = [1.0, 0.0, 0.0, 0.0]
    assert estimate("asymre", [rewards])[0] == pytest.approx([0.85, -0.15, -0.15, -0.15])
    assert estimate("asymre", [rewards], {"asymre": {"baseline_shift": 0}})[0] == pytest.approx(
        [0.75, -0.25, -0.25, -0.25]
    )


def test_red_drop_reference():
    advantages = estimate("red_drop", [[1, 0, 0, 0]])[0]
    assert advantages[0] == 0.5 and sorted(advantages[1:]) == [-0.5, 0, 0]


def test_red_drop_balances_and_is_reproducible():
    rewards = [1.0, 0.9, *[0.0] * 6]
    first, again = (estimate("red_drop", [rewards, rewards]) for _ in range(2))
    assert first == again
    for advantages in first:
        assert sum(a != 0 for a in advantages) == 4 and sum(advantages) == pytest.approx(0)
    seeds = {tuple(estimate("red_drop", [rewards], {"red_drop": {"seed": s}})[0]) for s in range(8)}
    assert len(seeds) > 1


@pytest.mark.parametrize("rewards", [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1], [0, 0]])
def test_red_drop_drops_nothing_where_bad_responses_do_not_prevail(rewards):
    mean = sum(rewards) / len(rewards)
    assert estimate("red_drop", [rewards])[0] == pytest.approx([r - mean for r in rewards])


def test_red_weight():
    advantages = estimate("red_weight", [[1, 0]], {"red_weight": {"temperature": 2}})[0]
    assert advantages == pytest.approx([0.5 * math.exp(0.25), -0.5 * math.exp(-0.25)])
    assert estimate("red_weight", [[1, 0]], {"red_weight": {"temperature": math.inf}})[0] == [0.5, -0.5]


@pytest.mark.parametrize(
    ("rewards", "k", "expected"),
    [
        ([0, 0.5, 1, 0.25], 2, [0.291667, 0.333333, 0.5, 0.291667]),
        ([0, 1, 1, 0, 0], 3, [0.5, 0.6, 0.6, 0.5, 0.5]),
        ([0.3, 0.6, 0.9], 1, [0.1, 0.2, 0.3]),
    ],
)
def test_max_at_k_reference(rewards, k, expected):
    assert_close(max_at_k_weights(torch.tensor(rewards).double(), k).tolist(), expected, atol=1e-6, rtol=0)


def test_leave_one_out_reference():
    rewards = torch.tensor([0, 0.5, 1, 0.25]).double()
    result = max_at_k_weights(rewards, 2) - leave_one_out_baseline(rewards, 2)
    assert_close(result.tolist(), [0.0, 0.125, 0.375, 0.041667], atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", range(1, 7))
def test_max_at_k_is_that_of_all_subsets(k):
    rewards = torch.tensor([0.3, -1.0, 0.3, 2.0, 0.0, 0.7]).double()
    subsets = list(itertools.combinations(range(6), k))
    expected = [sum(rewards[list(s)].max() for s in subsets if i in s) / len(subsets) for i in range(6)]
    weights = max_at_k_weights(rewards, k)
    assert_close(weights, torch.stack([torch.as_tensor(e) for e in expected]))
    assert_close(weights.sum() / k, sum(rewards[list(s)].max() for s in subsets) / len(subsets))
    if k == 1:
        return
    others = [[j for j in range(6) if j != i] for i in range(6)]
    means = [torch.stack([rewards[list(s)].max() for s in itertools.combinations(o, k - 1)]).mean() for o in others]
    assert_close(leave_one_out_baseline(rewards, k), k / 6 * torch.stack(means))


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
def test_max_at_1_is_reinforce(baseline):
    config = {"max_at_k": {"k": 1, "baseline": baseline}}
    assert estimate("max_at_k", [[0.3, 0.6, -0.9]], config)[0] == pytest.approx([0.3, 0.6, -0.9])


def test_max_at_n_is_verls_grpo_passk():
    rewards = torch.tensor([[0.2], [1.0], [0.7], [0.0]])
    config = OmegaConf.create({"max_at_k": {"k": 4}})
    index = np.array(["a"] * 4, dtype=object)
    verls, _ = compute_grpo_passk_outcome_advantage(
        rewards, torch.ones(4, 1), index, config=OmegaConf.create({"norm_adv_by_std_in_grpo": False})
    )
    ours, _ = get_adv_estimator_fn("max_at_k")(rewards, torch.ones(4, 1), index, config)
    assert_close(ours / 4, verls)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("max_at_k", {"max_at_k": {"k": 0}}, "algorithm.max_at_k.k must be a number >= 1, got 0"),
        ("max_at_k", {"max_at_k": {"k": 2.5}}, "algorithm.max_at_k.k must be a whole number, got 2.5"),
        ("max_at_k", {"max_at_k": {"k": 1, "baseline": "mean"}}, "max_at_k.baseline must be one of none"),
        ("oapl", {"oapl": {"beta1": 0}}, "algorithm.oapl.beta1 must be a number > 0, got 0"),
        ("oapl", {"oapl": {"beta1": "abc"}}, "algorithm.oapl.beta1 must be a number > 0, got 'abc'"),
        ("red_weight", {"red_weight": {"temperature": -1}}, "algorithm.red_weight.temperature must be a number > 0"),
        ("red_drop", {"red_drop": {"seed": "x"}}, "algorithm.red_drop.seed must be a number >= 0, got 'x'"),
        ("asymre", {"asymre": {"baseline_shift": float("inf")}}, "algorithm.asymre.baseline_shift must be finite"),
    ],
)
def test_wrong_settings_are_refused(name, config, message):
    with pytest.raises(ValueError, match=message):
        estimate(name, [[0, 1]], config)


def test_max_at_k_of_a_group_with_fewer_rows_than_k_is_the_best_of_all_of_them():
    short, whole = {"max_at_k": {"k": 5}}, {"max_at_k": {"k": 2}}
    assert estimate("max_at_k", [[0.2, 0.9]], short) == estimate("max_at_k", [[0.2, 0.9]], whole)


def test_padding_rows_of_verl_are_groups_without_response_tokens_and_get_no_advantage():
    rewards = torch.tensor([[0.3], [0.6], [0.9], [0.1], [0.0]])
    mask = torch.tensor([[1], [1], [1], [1], [0]])
    index = np.array(["a"] * 4 + ["padding"], dtype=object)
    config = OmegaConf.create({"max_at_k": {"k": 4}})
    advantages, _ = get_adv_estimator_fn("max_at_k")(rewards, mask, index, config)
    assert advantages[4] == 0 and advantages[:4].abs().sum() > 0
