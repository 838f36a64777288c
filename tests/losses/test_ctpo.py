"""The loss `ctpo`: reference values, a literal version, and its limits."""

import math

import pytest
import torch
from method_losses import evaluate, random_tensors
from torch.testing import assert_close

OFF = {"clip_low": math.inf, "clip_high": math.inf, "dual_clip": math.inf}


def literal(tensors, clip_low=0.025, clip_high=0.05, dual_clip=0.05, power=0.5):
    """Loss and gradient under the mean over responses of the mean over tokens, one token after the other."""
    gradient, losses = torch.zeros_like(tensors["log_prob"]), []
    whole = int(tensors["response_mask"].any(-1).sum())
    for row, mask in enumerate(tensors["response_mask"]):
        log_ratio, losses_here = 0.0, []
        for number, token in enumerate(mask.nonzero().flatten().tolist(), start=1):
            log_ratio += (tensors["log_prob"] - tensors["old_log_prob"])[row, token].item()
            w, a, t = math.exp(log_ratio), tensors["advantages"][row, token].item(), number**power
            low, high, dual = math.exp(-clip_low * t), math.exp(clip_high * t), math.exp(dual_clip * t)
            loss = max(-a * w, -a * min(max(w, low), high))
            is_clipped = (a > 0 and w > high) or (a < 0 and (w < low or w > dual))
            losses_here.append(min(loss, -a * dual) if a < 0 else loss)
            gradient[row, token] = 0 if is_clipped else -a * w / int(mask.sum()) / whole
        losses += [sum(losses_here) / len(losses_here)] if losses_here else []
    return sum(losses) / whole, gradient


def test_reference_values():
    loss, gradient, _ = evaluate("ctpo", loss_agg_mode="seq-mean-token-mean")
    assert_close(loss.item(), 0.058574, atol=1e-6, rtol=0)
    expected = torch.tensor([[0, 0, -0.091469], [0, 0, 0]], dtype=torch.float64)
    assert_close(gradient, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "values", [{}, OFF, {"clip_low": 0.5, "clip_high": 0.4, "dual_clip": 0.8, "power": 0.0}, {"power": 1.0}]
)
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_literal_version(seed, values):
    tensors = random_tensors(seed, scale=0.2)
    loss, gradient, _ = evaluate("ctpo", tensors, settings=values, loss_agg_mode="seq-mean-token-mean")
    expected_loss, expected = literal(tensors, **values)
    assert_close(loss.item(), expected_loss)
    assert_close(gradient, expected)


def test_of_one_token_it_is_ppo_with_bounds_on_the_log_ratio():
    tensors = random_tensors(4, shape=(40, 1))
    bounds = {"clip_low": math.log(1 / 0.8), "clip_high": math.log(1.2), "dual_clip": math.inf}
    _, gradient, _ = evaluate("ctpo", tensors, settings=bounds)
    _, expected, _ = evaluate("vanilla", tensors)
    assert (expected == 0).sum() > (~tensors["response_mask"]).sum(), "some are clipped"
    assert_close(gradient, expected)


def test_a_token_that_is_not_trained_neither_counts_nor_has_a_ratio():
    tensors = random_tensors(5, shape=(1, 6), scale=0.1)
    tensors["response_mask"] = torch.tensor([[True, True, False, False, True, True]])
    kept = tensors["response_mask"][0]
    _, gradient, _ = evaluate("ctpo", tensors)
    _, shorter, _ = evaluate("ctpo", {key: value[:, kept] for key, value in tensors.items()})
    assert_close(gradient[:, kept], shorter)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match=r"ctpo.power must be a number >= 0, got -1"):
        evaluate("ctpo", settings={"power": -1})
