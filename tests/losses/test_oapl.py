"""The loss `oapl`: reference values, its fixed point and its shape."""

import pytest
import torch
from method_losses import evaluate, random_tensors, shared_tensors
from torch.testing import assert_close
from verl.trainer.ppo.core_algos import get_policy_loss_fn


@pytest.mark.parametrize(
    ("beta2", "loss", "first", "second"), [(1e-3, 1.0001, -0.0010006, 0.0009995), (0.5, 1.12625, -0.65, 0.375)]
)
def test_reference_values(beta2, loss, first, second):
    value, gradient, _ = evaluate("oapl", settings={"beta2": beta2})
    assert_close(value.item(), loss, atol=1e-6, rtol=0)
    expected = torch.tensor([[first] * 3, [second, second, 0]], dtype=torch.float64)
    assert_close(gradient, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_zero_exactly_at_the_fixed_point(seed):
    tensors = random_tensors(seed)
    log_ratio = torch.where(tensors["response_mask"], tensors["log_prob"] - tensors["old_log_prob"], 0.0)
    fixed_point = 0.25 * log_ratio.sum(-1, keepdim=True)
    tensors["advantages"] = fixed_point.expand_as(log_ratio).contiguous()
    loss, gradient, _ = evaluate("oapl", tensors, settings={"beta2": 0.25})
    assert_close(loss, torch.zeros_like(loss), atol=1e-24, rtol=0)
    assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    tensors["advantages"] = tensors["advantages"] + 1e-3
    loss, gradient, _ = evaluate("oapl", tensors, settings={"beta2": 0.25})
    assert loss > 0 and (gradient[tensors["response_mask"]] != 0).all()


def test_all_tokens_of_a_response_have_the_same_gradient():
    tensors = random_tensors(7)
    _, gradient, _ = evaluate("oapl", tensors)
    for row, mask in zip(gradient, tensors["response_mask"], strict=True):
        assert row[mask].unique().numel() <= 1


def test_it_is_a_mean_over_responses_of_a_squared_residual():
    tensors = random_tensors(8)
    log_prob = tensors["log_prob"].clone().requires_grad_()
    mask = tensors["response_mask"]
    summed = torch.where(mask, log_prob - tensors["old_log_prob"], 0.0).sum(-1)
    residual = (0.1 * summed - tensors["advantages"][:, 0]).square()[mask.any(-1)]
    residual.mean().backward()
    loss, gradient, _ = evaluate("oapl", tensors, settings={"beta2": 0.1})
    assert_close((loss, gradient), (residual.mean().detach(), log_prob.grad))


def test_unit_gradient_divides_by_twice_beta2():
    tensors = random_tensors(9)
    plain = evaluate("oapl", tensors, settings={"beta2": 0.01})
    scaled = evaluate("oapl", tensors, settings={"beta2": 0.01, "unit_gradient": True})
    assert_close((scaled[0], scaled[1]), (plain[0] * 50, plain[1] * 50))


def test_equal_rewards_still_pull_back_to_the_behaviour_policy():
    tensors = {**shared_tensors(), "advantages": torch.zeros(2, 3).double()}
    _, gradient, _ = evaluate("oapl", tensors)
    assert (gradient[tensors["response_mask"]] != 0).all()


def test_another_aggregation_is_refused():
    from method_losses import actor_config

    with pytest.raises(ValueError, match=r"loss_agg_mode=seq-mean-token-sum \(it is token-mean\)"):
        get_policy_loss_fn("oapl")(**shared_tensors(), loss_agg_mode="token-mean", config=actor_config("oapl"))
