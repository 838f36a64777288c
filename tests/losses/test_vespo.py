"""The loss `vespo`: reference values, a literal version, and its limits."""

import math

import pytest
import torch
from method_losses import evaluate, on_policy, random_tensors, reinforce_gradient
from torch.testing import assert_close


def literal(tensors, k_positive=2.0, lambda_positive=3.0, k_negative=3.0, lambda_negative=2.0):
    """The paper's weights, one response after the other; the gradient under the token mean."""
    gradient = torch.zeros_like(tensors["log_prob"])
    for row, mask in enumerate(tensors["response_mask"]):
        log_ratio = tensors["log_prob"][row] - tensors["old_log_prob"][row]
        w = math.exp(sum(log_ratio[mask].tolist()))
        for token in mask.nonzero().flatten().tolist():
            advantage = tensors["advantages"][row, token].item()
            k, decay = (k_positive, lambda_positive) if advantage >= 0 else (k_negative, lambda_negative)
            gradient[row, token] = -math.exp(decay) * w**k * math.exp(-decay * w) * advantage
    return gradient / tensors["response_mask"].sum()


def test_reference_values():
    loss, gradient, _ = evaluate("vespo")
    assert_close(loss.item(), 0.629935, atol=1e-6, rtol=0)
    expected = torch.tensor([[-0.233197] * 3, [0.098028, 0.098028, 0]], dtype=torch.float64)
    assert_close(gradient, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("values", [{}, {"k_positive": 1.0, "lambda_positive": 0.5, "k_negative": 0.0}])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_literal_version(seed, values):
    tensors = random_tensors(seed)
    _, gradient, _ = evaluate("vespo", tensors, settings=values)
    assert_close(gradient, literal(tensors, **values))


def test_without_k_and_lambda_it_is_reinforce_however_old_the_data():
    tensors = random_tensors(1, scale=3.0)
    off = dict.fromkeys(("k_positive", "lambda_positive", "k_negative", "lambda_negative"), 0.0)
    _, gradient, _ = evaluate("vespo", tensors, settings=off)
    assert_close(gradient, reinforce_gradient(tensors))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_response_weighs_most_where_its_ratio_is_k_over_lambda(sign):
    tensors = on_policy(random_tensors(2, shape=(1, 1)))
    tensors |= {"response_mask": torch.ones(1, 1, dtype=torch.bool), "advantages": torch.full((1, 1), sign).double()}
    at = math.log(2 / 3 if sign > 0 else 3 / 2)

    def weight(log_ratio):
        moved = {**tensors, "log_prob": tensors["old_log_prob"] + log_ratio}
        return evaluate("vespo", moved)[1].abs().item()

    assert weight(at) > max(weight(at - 0.05), weight(at + 0.05))
    assert weight(-30.0) < 1e-12 and weight(30.0) == 0


def test_rollout_correction_weights_are_part_of_the_ratio():
    tensors = random_tensors(3)
    correction = torch.linspace(-0.2, 0.2, 9, dtype=torch.float64).expand(6, 9)
    _, weighted, _ = evaluate("vespo", tensors, rollout_is_weights=correction.exp())
    _, shifted, _ = evaluate("vespo", {**tensors, "old_log_prob": tensors["old_log_prob"] - correction})
    assert_close(weighted, shifted)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match=r"vespo.k_negative must be a number >= 0 < 1e\+06, got -1"):
        evaluate("vespo", settings={"k_negative": -1})
