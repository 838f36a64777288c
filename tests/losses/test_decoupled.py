"""Decoupled PPO and ReMix's shifted clip: reference values and their common limit, PPO's clip."""

import math

import pytest
import torch
from method_losses import PROXIMAL_LOG_PROB, actor_config, evaluate, random_tensors, shared_tensors
from torch.testing import assert_close

from verl_m2po.losses.family.decoupled_loglinear import DecoupledLoglinearConfig
from verl_m2po.losses.kernel.decoupled import decoupled_tokens
from verl_m2po.losses.kernel.tokens import tokens_of


def proximal() -> torch.Tensor:
    return torch.tensor(PROXIMAL_LOG_PROB, dtype=torch.float64)


def test_reference_value_of_decoupled_ppo_by_verls_own_preset():
    tensors = shared_tensors()
    weights = (proximal() - tensors["old_log_prob"]).exp()
    loss, _, _ = evaluate("vanilla", {**tensors, "old_log_prob": proximal()}, rollout_is_weights=weights)
    assert_close(loss.item(), -0.107357, atol=1e-6, rtol=0)


def test_reference_value_of_decoupled_ppo_by_our_rule():
    tensors = shared_tensors()
    mask = tensors["response_mask"]
    tokens = tokens_of(**tensors)
    settings = DecoupledLoglinearConfig(alpha=0, ratio_cap=float("inf"))
    loss = decoupled_tokens(tokens, proximal() - tensors["old_log_prob"], settings)
    assert_close(loss.value[mask].mean().item(), -0.107357, atol=1e-6, rtol=0)


def test_reference_value_of_mix_ppg():
    tensors = shared_tensors()
    weights = (proximal() - tensors["old_log_prob"]).exp()
    loss, _, _ = evaluate("mix_ppg", {**tensors, "old_log_prob": proximal()}, rollout_is_weights=weights)
    assert_close(loss.item(), -0.123096, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("ppo_ewma", {}),
        ("decoupled_loglinear", {"alpha": 0.0}),
        ("decoupled_loglinear", {"staleness_updates": 0}),
        ("decoupled_loglinear", {"staleness_updates": 1}),
        ("mix_ppg", {}),
    ],
)
def test_with_the_behaviour_policy_as_proximal_policy_it_is_verls_ppo_clip(name, values, seed):
    tensors = random_tensors(seed)
    assert_close(evaluate(name, tensors, settings=values)[:2], evaluate("vanilla", tensors)[:2])


@pytest.mark.parametrize("seed", range(4))
def test_loglinear_is_verls_decoupled_ppo_with_the_interpolated_policy(seed):
    tensors = random_tensors(seed)
    log_weight = 0.75 * (tensors["log_prob"] - tensors["old_log_prob"])
    verls = evaluate(
        "vanilla",
        {**tensors, "old_log_prob": tensors["old_log_prob"] + log_weight},
        rollout_is_weights=log_weight.exp(),
    )
    assert_close(evaluate("decoupled_loglinear", tensors, settings={"alpha": 0.75})[:2], verls[:2])


def test_with_lag_s_the_clip_is_the_sth_power():
    # alpha = 3/4: clipped iff r > 1.2^4 = 2.0736 for A > 0, r < 0.8^4 = 0.4096 for A < 0.
    ratios = torch.tensor([[2.07, 2.08, 0.411, 0.409]]).double()
    tensors = {
        "old_log_prob": torch.full((1, 4), -3.0).double(),
        "log_prob": -3.0 + ratios.log(),
        "advantages": torch.tensor([[1.0, 1.0, -1.0, -1.0]]).double(),
        "response_mask": torch.ones(1, 4, dtype=torch.bool),
    }
    _, gradient, _ = evaluate("decoupled_loglinear", tensors, settings={"staleness_updates": 4})
    assert (gradient[0] != 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("values", [{"alpha": 1.0}, {"alpha": 0.3, "clip_low": 1, "clip_high": float("inf")}])
def test_without_clip_it_is_plain_importance_sampling(values):
    tensors = random_tensors(5)
    plain = evaluate("no_trust_region", tensors)
    assert_close(evaluate("decoupled_loglinear", tensors, settings=values)[:2], plain[:2])


def test_mix_ppg_without_clip_is_plain_importance_sampling():
    tensors = random_tensors(5)
    weights = torch.linspace(0.5, 2, 9).double().expand(6, 9)
    behaviour = {**tensors, "old_log_prob": tensors["old_log_prob"] - weights.log()}
    ours = evaluate("mix_ppg", tensors, settings={"clip": float("inf")}, rollout_is_weights=weights)
    assert_close(ours[:2], evaluate("no_trust_region", behaviour)[:2])


def test_the_cap_bounds_the_weight_of_a_token():
    tensors = random_tensors(6, scale=0.0)
    tensors["advantages"] = -torch.ones_like(tensors["advantages"])
    tensors["log_prob"] = tensors["old_log_prob"] + 8.0
    _, gradient, _ = evaluate(
        "decoupled_loglinear", tensors, settings={"alpha": 0.5, "ratio_cap": 100}, loss_agg_mode="token-sum"
    )
    assert_close(gradient, torch.where(tensors["response_mask"], 100.0, 0.0).double())


def test_a_token_that_rollout_correction_cut_out_has_no_gradient():
    tensors = shared_tensors()
    weights = torch.ones(2, 3).double()
    weights[0, 1] = 0.0
    _, gradient, _ = evaluate("mix_ppg", tensors, rollout_is_weights=weights)
    assert gradient[0, 1] == 0 and gradient[0, 2] != 0


@pytest.mark.parametrize("values", [{}, {"alpha": 0.5, "staleness_updates": 4}])
def test_the_proximal_policy_is_said_exactly_once(values):
    with pytest.raises(ValueError, match=r"Set exactly one of .*decoupled_loglinear.alpha and .staleness_updates"):
        evaluate("decoupled_loglinear", settings=values)


def test_mix_ppg_without_the_proximal_policy_is_refused():
    from method_losses import actor_config
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    with pytest.raises(ValueError, match="rollout_is=token"):
        get_policy_loss_fn("mix_ppg")(**shared_tensors(), config=actor_config("mix_ppg"))


def test_reference_value_of_ppo_ewma():
    loss, _, _ = evaluate("ppo_ewma", averaged_log_prob=proximal())
    assert_close(loss.item(), -0.107357, atol=1e-6, rtol=0)


def authors_loss(tensors, averaged, clip=0.2, cap=100.0):
    """As `compute_losses` of openai/ppo-ewma has it, differentiated by torch."""
    log_prob = tensors["log_prob"].clone().requires_grad_()
    behaviour, mask, advantages = tensors["old_log_prob"], tensors["response_mask"], tensors["advantages"]
    adjusted = torch.maximum(behaviour, log_prob.detach() - math.log(cap))
    plain = -advantages * (log_prob - adjusted).exp()
    clipped = (log_prob - averaged).clamp(math.log(1 - clip), math.log(1 + clip))
    losses = torch.maximum(plain, -advantages * (clipped + averaged - adjusted).exp())
    loss = losses[mask].sum() / mask.sum()
    loss.backward()
    return loss.detach(), log_prob.grad


@pytest.mark.parametrize("cap", [100.0, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_ppo_ewma_is_its_authors_loss(seed, cap):
    tensors = random_tensors(seed)
    averaged = random_tensors(seed + 100)["log_prob"] - 1
    found = evaluate("ppo_ewma", tensors, settings={"ratio_cap": cap}, averaged_log_prob=averaged)
    expected = authors_loss(tensors, averaged, cap=cap)
    assert_close(found[:2], expected)
    assert 0 < int((expected[1] == 0)[tensors["response_mask"]].sum()) < int(tensors["response_mask"].sum())


def test_around_the_present_policy_ppo_ewma_clips_nothing():
    tensors = random_tensors(1)
    found = evaluate("ppo_ewma", tensors, settings={"ratio_cap": math.inf}, averaged_log_prob=tensors["log_prob"])
    assert_close(found[:2], evaluate("no_trust_region", tensors)[:2])


def test_a_token_that_the_average_has_no_log_prob_for_has_no_gradient():
    tensors = random_tensors(2)
    tensors["response_mask"][0, 0] = True
    averaged = tensors["old_log_prob"].clone()
    averaged[0, 0] = -math.inf
    loss, gradient, _ = evaluate("ppo_ewma", tensors, averaged_log_prob=averaged)
    _, expected, _ = evaluate("ppo_ewma", tensors)
    assert loss.isfinite() and gradient[0, 0] == 0
    expected[0, 0] = 0
    assert_close(gradient, expected)


def test_without_our_actor_worker_there_is_no_average():
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    with pytest.raises(RuntimeError, match=r"loss_mode=ppo_ewma needs the actor worker .* loss=decoupled_ppo"):
        get_policy_loss_fn("ppo_ewma")(**shared_tensors(), config=actor_config("ppo_ewma"))
