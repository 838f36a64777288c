"""What the presets after RAPID and SPEAR take of verl: reference values by hand, and laws."""

import pytest
import torch
from compose import composed
from hydra.utils import instantiate
from method_losses import evaluate, random_tensors
from verl.trainer.config.algorithm import RolloutCorrectionConfig

RAPID = RolloutCorrectionConfig(
    bypass_mode=True, loss_type="reinforce", rollout_is="token", rollout_is_threshold=2.0, rollout_rs=None
)


def test_rapid_is_reinforce_with_truncated_weights():
    """r = [1.221403, 1, .449329], [1.648721, .367879], none above 2.

    Sum of -A r log p: .610702 + 1 + .898658 - .659488 - .551819 = 1.298053; over five tokens .259611.
    """
    loss, gradient, _ = evaluate("bypass_mode", rollout_correction=RAPID)
    assert float(loss) == pytest.approx(0.259611, abs=1e-6)
    expected = torch.tensor([[-1.221403, -1, -0.449329], [1.648721, 0.367879, 0]]) / 5
    torch.testing.assert_close(gradient, expected.double(), rtol=0, atol=1e-6)


def test_rapid_with_one_mini_batch_is_on_policy_reinforce():
    """As many prompts in a mini-batch as in a batch: every ratio is 1."""
    tensors = random_tensors(3)
    tensors["old_log_prob"] = tensors["log_prob"].clone()
    _, gradient, _ = evaluate("bypass_mode", tensors, rollout_correction=RAPID)
    mask = tensors["response_mask"]
    torch.testing.assert_close(gradient, -tensors["advantages"] * mask / mask.sum())


# Covariances (A - .2)(log p + 1.08): [.464, .064, -.736], [-.816, .504]; with PPO's clip at .9 nothing else is clipped.
@pytest.mark.parametrize(
    ("highest", "dropped", "value"),
    [(0.6, [(0, 0), (1, 1)], 0.039878), (0.5, [(0, 0)], 0.113454), (0.45, [], -0.130826)],
)
def test_clip_cov_takes_out_the_tokens_whose_covariance_lies_between_its_bounds(highest, dropped, value):
    """-A r without the dropped: -1.221403 - 1 - .449329 + 1.648721 + .367879, over five tokens."""
    bounds = {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.4, "clip_cov_ub": highest}
    loss, gradient, _ = evaluate(
        "clip_cov", actor={"clip_ratio": 0.9, "clip_ratio_low": 0.9, "clip_ratio_high": 0.9}, **bounds
    )
    assert float(loss) == pytest.approx(value, abs=1e-6)
    without = [(i, j) for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)) if gradient[i, j] == 0]
    assert without == dropped


def test_self_imitation_gives_verls_loss_spears_numbers():
    config = composed("replay=self_imitation", "algorithm.policy_loss=clip_cov")
    settings = instantiate(config.actor_rollout_ref.actor.policy_loss, _convert_="partial")
    numbers = (settings.clip_cov_ratio, settings.clip_cov_lb, settings.clip_cov_ub)
    assert (settings.loss_mode, *numbers) == ("clip_cov", 0.02, 1.0, 40.0)
