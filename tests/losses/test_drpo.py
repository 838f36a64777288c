"""The loss `drpo`: reference values, a literal version, the gradient of its paper, and its limits."""

import math

import pytest
import torch
from method_losses import evaluate, random_tensors
from torch.testing import assert_close


def literal(tensors, delta=12.5):
    """Mean over the tokens of the objective as the paper writes it, differentiated by torch."""
    log_prob = tensors["log_prob"].clone().requires_grad_()
    mask, advantages = tensors["response_mask"], tensors["advantages"]
    behaviour = tensors["old_log_prob"].exp()
    ratio = (log_prob - tensors["old_log_prob"]).exp()
    objective = ratio * advantages - advantages.abs() / (2 * delta) * behaviour * (ratio - 1) ** 2
    loss = -objective[mask].sum() / mask.sum()
    loss.backward()
    return loss.detach(), log_prob.grad


def test_reference_values():
    """Of the shared tensors, worked out with Python's own exp."""
    loss, gradient, _ = evaluate("drpo", settings={"delta": 12.5})
    assert_close(loss.item(), -0.126593, atol=1e-6, rtol=0)
    expected = torch.tensor([[-0.242132, -0.2, -0.091058], [0.336702, 0.071319, 0]], dtype=torch.float64)
    assert_close(gradient, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("delta", [12.5, 0.15, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_literal_version(seed, delta):
    tensors = random_tensors(seed)
    loss, gradient, _ = evaluate("drpo", tensors, settings={"delta": delta})
    expected_loss, expected = literal(tensors, delta)
    assert_close(loss, expected_loss)
    assert_close(gradient, expected)


@pytest.mark.parametrize("seed", range(3))
def test_the_weight_falls_to_zero_at_delta_and_turns_back_beyond(seed):
    """The paper's Table 1: 1 - sign(A (r - 1)) |pi - mu| / delta, times the gradient without a trust region."""
    tensors = random_tensors(seed)
    _, gradient, _ = evaluate("drpo", tensors, settings={"delta": 0.1})
    _, free, _ = evaluate("no_trust_region", tensors)
    moved = tensors["log_prob"].exp() - tensors["old_log_prob"].exp()
    weight = 1 - torch.sign(tensors["advantages"]) * moved / 0.1
    assert (weight[tensors["response_mask"]] < 0).any(), "some are beyond"
    assert_close(gradient, free * weight)


def test_without_a_trust_region_it_is_plain_importance_weighting():
    tensors = random_tensors(3)
    found = evaluate("drpo", tensors, settings={"delta": math.inf})[:2]
    assert_close(found, evaluate("no_trust_region", tensors)[:2])


@pytest.mark.parametrize("delta", [0, -1, math.nan, "wide"])
def test_a_distance_that_is_none_is_refused(delta):
    with pytest.raises(ValueError, match=r"drpo.delta must be a number > 0"):
        evaluate("drpo", settings={"delta": delta})
