"""The decision and the losses on the device: what float64 on the processor gives, and no wait for the host."""

import contextlib

import pytest
import torch
from host_transfers import no_host_transfers, without_values
from method_losses import looked_ahead
from token_batches import heavy_tailed
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.plugin import EXTENSIONS
from verl_m2po.second_moment import keep_mask

(LOSSES,) = (extension.names for extension in EXTENSIONS if extension.what == "policy loss")
# Each micro-batch decides alone: no actor worker is here to decide before.
SETTINGS = {
    "m2po": {"m2po": {"scope": "micro_batch"}},
    "bapo": {"bapo": {"scope": "micro_batch"}},
    "opsm": {"opsm": {"delta": 0.1}},
    "decoupled_loglinear": {"decoupled_loglinear": {"alpha": 0.5}},
}
# Relative error of a sum of a few hundred terms that are rounded to the dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
THRESHOLD = 0.04


def gradient(name, log_prob, old_log_prob, advantages, response_mask, compiled_by=None):
    """Of the loss `name` to its log-probs, on their device and in their dtype."""
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=M2POPolicyLossConfig(**SETTINGS.get(name, {})),
    )
    config.global_batch_info.update(dp_size=1, batch_num_tokens=int(response_mask.sum()), global_batch_size=6)
    loss_fn = get_policy_loss_fn(name)
    if compiled_by is not None:
        loss_fn = torch.compile(loss_fn, backend=compiled_by)
    log_prob = log_prob.clone().requires_grad_()
    with looked_ahead(name, old_log_prob):
        loss, _ = loss_fn(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode="seq-mean-token-sum",
            config=config,
            rollout_is_weights=torch.ones_like(advantages),
        )
    loss.backward()
    return log_prob.grad


def arguments(dtype, device="cpu", spread=0.02):
    """Log-probs of which a few are far from the old ones, the same numbers in every dtype that can hold `dtype`."""
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=0)
    old_log_prob = torch.full_like(log_ratio, -1.0)
    columns = ((old_log_prob + spread * log_ratio.clamp(-20, 20)), old_log_prob, advantages)
    return [column.to(dtype).to(device) for column in columns] + [response_mask.to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_decision_is_that_of_the_processor(device, dtype):
    log_ratio, advantages, response_mask = heavy_tailed(64, 257, seed=1, dtype=dtype)
    expected = keep_mask(log_ratio.double(), advantages.double(), response_mask, THRESHOLD)
    found = keep_mask(*(column.to(device) for column in (log_ratio, advantages, response_mask)), THRESHOLD)
    assert found.device.type == device and torch.equal(found.cpu(), expected)
    assert 0 < int(expected.sum()) < int(response_mask.sum())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_that_of_float64_on_the_processor(device, name, dtype):
    tensors = arguments(dtype, device)
    exact = [column.cpu().double() for column in tensors[:3]] + [tensors[3].cpu()]
    expected, found = gradient(name, *exact), gradient(name, *tensors).cpu().double()
    assert expected.norm() > 0
    assert (found - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@contextlib.contextmanager
def no_wait(device):
    """Fail where the host waits for the device."""
    if device == "cpu":
        with no_host_transfers():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_decision_does_not_wait(device):
    columns = heavy_tailed(64, 257, seed=1)
    # Without a device, tensors without values stand in for one.
    on_device = without_values(*columns) if device == "cpu" else [column.to(device) for column in columns]
    with no_wait(device):
        keep = keep_mask(*on_device, THRESHOLD)
    assert keep.shape == columns[0].shape


@pytest.mark.parametrize("name", ["m2po", "no_trust_region", "topr"])
def test_a_compiled_loss_is_the_same(device, name):
    if name == "m2po" and device == "cpu":
        pytest.skip("the decision on the processor is NumPy's")
    tensors = arguments(torch.float32, device)
    # On the processor without a compiler of C++: the graph is traced and run as it is.
    compiled = gradient(name, *tensors, compiled_by="aot_eager" if device == "cpu" else "inductor")
    torch.testing.assert_close(compiled, gradient(name, *tensors))
