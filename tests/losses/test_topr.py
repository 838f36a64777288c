"""The loss `topr`: reference values and its limits."""

import pytest
import torch
from method_losses import evaluate, random_tensors, reinforce_gradient
from torch.testing import assert_close


@pytest.mark.parametrize(("level", "expected"), [("sequence", 0.469518), ("token", 0.509636), ("geometric", 0.404056)])
def test_reference_values(level, expected):
    loss, gradient, _ = evaluate("topr", settings={"level": level})
    assert_close(loss.item(), expected, atol=1e-6, rtol=0)
    assert_close(gradient[0], torch.full((3,), -0.2, dtype=torch.float64))


def test_reference_gradient_of_negative_tokens():
    _, gradient, _ = evaluate("topr")
    assert_close(gradient[1], torch.tensor([0.121306, 0.121306, 0], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", ["sequence", "token", "geometric"])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_good_tokens_do_not_depend_on_the_behaviour_policy(level, shift):
    tensors = random_tensors(3)
    tensors["advantages"] = tensors["advantages"].abs()
    tensors["old_log_prob"] = tensors["old_log_prob"] + shift
    _, gradient, _ = evaluate("topr", tensors, settings={"level": level})
    assert_close(gradient, reinforce_gradient(tensors))


@pytest.mark.parametrize("level", ["sequence", "token", "geometric"])
def test_bad_tokens_fade_with_their_ratio_and_are_never_amplified(level):
    tensors = random_tensors(4)
    tensors["advantages"] = -tensors["advantages"].abs()
    bound = reinforce_gradient(tensors)
    for shift in (-30.0, 0.0, 30.0):
        moved = {**tensors, "log_prob": tensors["old_log_prob"] + shift}
        _, gradient, _ = evaluate("topr", moved, settings={"level": level})
        assert_close(gradient, bound if shift >= 0 else torch.zeros_like(bound), atol=1e-12, rtol=1e-9)


def test_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"topr.level must be one of sequence, token, geometric, got 'seq'"):
        evaluate("topr", settings={"level": "seq"})
