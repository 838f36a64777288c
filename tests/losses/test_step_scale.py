"""VCPO's step scale: reference values, laws, ranks, and why the loss must not be scaled in its place."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_losses import shared_tensors
from ranks import run_on_ranks
from share_ranks import share_of_all
from torch.testing import assert_close

from verl_m2po.losses.config import StepScaleConfig
from verl_m2po.losses.kernel.tokens import tokens_of
from verl_m2po.losses.step_scale import effective_sample_share, scaled_learning_rate, sequence_log_weight, step_scale

pytestmark = pytest.mark.slow


def test_reference_values():
    share = effective_sample_share(torch.tensor([4.0, 1.0, 1.0, 1e-30]).log())
    assert_close((share, step_scale(share)), (0.5, 0.707107), atol=1e-6, rtol=0)
    assert step_scale(0.5, power=1) == 0.5
    tensors = shared_tensors()
    log_weight = sequence_log_weight(tokens_of(**tensors))
    assert_close(log_weight.exp().tolist(), [0.548812, 0.606531], atol=1e-6, rtol=0)
    assert_close(effective_sample_share(log_weight), 0.99751, atol=1e-5, rtol=0)


log_weights = st.lists(st.floats(-700, 700), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(log_weights, st.floats(-300, 300))
def test_the_share_is_between_one_response_and_all_whatever_the_scale(values, shift):
    log_weight = torch.tensor(values, dtype=torch.float64)
    share = effective_sample_share(log_weight)
    assert 1 / len(values) - 1e-9 <= share <= 1 + 1e-9
    assert effective_sample_share(log_weight + shift) == pytest.approx(share, rel=1e-9)


def test_equal_weights_and_no_responses_do_not_scale():
    assert effective_sample_share(torch.full((7,), 123.0)) == pytest.approx(1)
    assert effective_sample_share(torch.zeros(0)) == effective_sample_share(torch.full((2,), -float("inf"))) == 1


def test_copies_of_all_responses_change_nothing():
    log_weight = torch.tensor([4.0, 1.0, 0.5]).log()
    assert effective_sample_share(log_weight.repeat(4)) == pytest.approx(effective_sample_share(log_weight))


def test_the_scale_grows_with_the_share_and_ends_at_the_base():
    scales = [step_scale(share, base_share=0.55) for share in (0.1, 0.3, 0.55, 0.8, 1.0)]
    assert scales == sorted(scales) and scales[2:] == [1, 1, 1]
    assert step_scale(0.1, power=0) == 1


def test_tokens_that_do_not_count():
    log_ratio = torch.tensor([[0.5, float("nan"), float("inf")], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    log_weight = sequence_log_weight(tokens_of(log_ratio, torch.zeros(3, 3), torch.ones(3, 3), mask))
    # Rows without a response token are padding.
    assert log_weight.tolist() == [0.5, 3.0, -float("inf")]
    assert effective_sample_share(log_weight) == effective_sample_share(log_weight[:2])


def test_ranks_form_it_together():
    alone = effective_sample_share(torch.tensor([500.0, -3.0, 499.0, 498.5]))
    for share in run_on_ranks((3,), share_of_all)[3]:
        assert share.item() == pytest.approx(alone, rel=1e-12)


def trained(scale_loss: float, scale_step: float) -> torch.Tensor:
    """A parameter after 20 steps of AdamW."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        (scale_loss * parameter.square().sum()).backward()
        with scaled_learning_rate(optimizer, scale_step):
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.01
    return parameter.detach()


def test_under_adam_scaling_the_loss_is_not_scaling_the_step():
    plain = trained(1.0, 1.0)
    assert_close(trained(0.5, 1.0), plain, atol=1e-6, rtol=0)
    assert (trained(1.0, 0.5) - plain).abs().min() > 0.05


def test_the_learning_rate_comes_back_after_a_step_that_failed():
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(2)], "lr": 0.2}], lr=1
    )
    with pytest.raises(RuntimeError), scaled_learning_rate(optimizer, 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
        raise RuntimeError
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"base_share": 0}, r"base_share is a share .* in \(0, 1\], got 0"),
        ({"base_share": 1.5}, r"base_share is a share"),
        ({"power": -1}, r"power must be a number >= 0 .* or null"),
        ({"power": float("inf")}, r"power must be a number >= 0"),
        ({"power": "sqrt"}, r"power must be a number, got 'sqrt'"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=rf"policy_loss\.step_scale\.{message}"):
        StepScaleConfig(**wrong)


def test_null_and_zero_switch_it_off():
    assert not StepScaleConfig().is_on and not StepScaleConfig(power=0).is_on and StepScaleConfig(power=0.5).is_on
