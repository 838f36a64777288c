"""VCPO's step scale: reference values, laws, ranks, and why the loss must not be scaled in its place."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_losses import shared_tensors
from torch.testing import assert_close

from verl_m2po.step_scale import POWERS, effective_sample_share, sequence_log_weight, step_scale

pytestmark = pytest.mark.slow


def test_reference_values():
    share = effective_sample_share(torch.tensor([4.0, 1.0, 1.0, 0.0]).log())
    assert_close((share, step_scale(share)), (0.5, 0.707107), atol=1e-6, rtol=0)
    assert step_scale(0.5, power=POWERS["linear"]) == 0.5
    tensors = shared_tensors()
    log_weight = sequence_log_weight(tensors["log_prob"] - tensors["old_log_prob"], tensors["response_mask"])
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
    assert effective_sample_share(torch.zeros(0)) == 1


def test_the_scale_grows_with_the_share_and_ends_at_the_base():
    scales = [step_scale(share, base_share=0.55) for share in (0.1, 0.3, 0.55, 0.8, 1.0)]
    assert scales == sorted(scales) and scales[2:] == [1, 1, 1]
    assert step_scale(0.1, power=0) == 1


def test_tokens_that_do_not_count():
    log_ratio = torch.tensor([[0.5, float("nan"), float("inf")], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    assert sequence_log_weight(log_ratio, mask).tolist() == [0.5, 3.0]


def test_ranks_form_it_together(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "support" / "share_ranks.py", str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]
    shares = {process.communicate(timeout=120)[0].strip() for process in ranks}
    alone = effective_sample_share(torch.tensor([500.0, -3.0, 499.0, 498.5]))
    assert shares == {f"{alone:.12f}"}


def trained(scale_loss: float, scale_step: float) -> torch.Tensor:
    """A parameter after 20 steps of AdamW."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    for _ in range(20):
        optimizer.zero_grad()
        (scale_loss * parameter.square().sum()).backward()
        optimizer.param_groups[0]["lr"] = 0.01 * scale_step
        optimizer.step()
    return parameter.detach()


def test_under_adam_scaling_the_loss_is_not_scaling_the_step():
    plain = trained(1.0, 1.0)
    assert_close(trained(0.5, 1.0), plain, atol=1e-6, rtol=0)
    assert (trained(1.0, 0.5) - plain).abs().min() > 0.05


@pytest.mark.parametrize(("base", "power"), [(0, 0.5), (1.5, 0.5), (1, -1)])
def test_wrong_settings_are_refused(base, power):
    with pytest.raises(ValueError, match=r"must (be in \(0, 1\]|not be negative)"):
        step_scale(0.5, base, power)
