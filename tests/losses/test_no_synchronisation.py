"""No loss of this package makes the host wait for the accelerator under our actor worker."""

from collections import deque

import pytest
import torch
from host_transfers import HostTransferError, no_host_transfers, without_values
from token_batches import heavy_tailed
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from verl_m2po.losses.config import M2POPolicyLossConfig
from verl_m2po.losses.family.bapo import Bounds
from verl_m2po.losses.kernel.diagnostics import added_up
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.registry import LOSSES
from verl_m2po.second_moment import TrustRegion

CASES = {
    **{name: (name, {}) for name, loss in sorted(LOSSES.items()) if loss.leaves_sums},
    "decoupled_loglinear": ("decoupled_loglinear", {"decoupled_loglinear": {"alpha": 0.5}}),
    "m2po by micro_batch": ("m2po", {"m2po": {"scope": "micro_batch"}}),
    "m2po with sequence masking": ("m2po", {"opsm": {"delta": 0.1}}),
}
# What the actor worker has decided before the loss is called.
DECISIONS = {"m2po": TrustRegion, "bapo": Bounds}


def run(name, settings, log_prob, old_log_prob, advantages, response_mask, weights):
    """Forward, backward and the sums of a micro-batch, as our actor worker has them made."""
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=M2POPolicyLossConfig(**settings),
    )
    config.global_batch_info.update(dp_size=2, batch_num_tokens=1000, global_batch_size=12)
    decision = DECISIONS.get(name)
    if decision is not None:
        decision = decision(*(log_prob.new_full((), value) for value in (0.4, 0.3, 0.5)))
    log_prob = log_prob.clone().requires_grad_()
    with training(MiniBatch(decision=decision, averaged=deque([old_log_prob]))) as mini_batch:
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages,
            response_mask=response_mask,
            loss_agg_mode="seq-mean-token-sum",
            config=config,
            rollout_is_weights=weights,
        )
    loss.backward()
    return log_prob.grad, added_up(mini_batch.sums), metrics


def arguments(dtype=torch.float32):
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=0, dtype=dtype)
    old_log_prob = torch.full_like(log_ratio, -1.0)
    return (old_log_prob + log_ratio).to(dtype), old_log_prob, advantages, response_mask, torch.ones_like(advantages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_from_or_copied_to_the_device(case, dtype):
    name, settings = CASES[case]
    tensors = without_values(*arguments(dtype))
    with no_host_transfers():
        gradient, sums, _ = run(name, settings, *tensors)
    assert gradient.shape == tensors[0].shape and sums.device.type == "meta"


@pytest.mark.parametrize(
    "transfer",
    [
        lambda tensor: tensor.sum().item(),
        lambda tensor: bool(tensor.any()),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor * torch.zeros(40),
        lambda tensor: tensor.new_tensor([1.0]),
        lambda tensor: torch.tensor(1.0, device="meta"),
        lambda tensor: tensor[[0, 1]],
    ],
)
def test_the_watch_sees(transfer):
    (tensor,) = without_values(torch.zeros(6, 40))
    with pytest.raises((HostTransferError, RuntimeError)), no_host_transfers():
        transfer(tensor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_cuda_is_not_synchronised_and_gives_what_the_cpu_gives(case):
    name, settings = CASES[case]
    on_host = arguments()
    expected_gradient, expected_sums, _ = run(name, settings, *on_host)
    tensors = [tensor.cuda() for tensor in on_host]
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient, sums, _ = run(name, settings, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(gradient.cpu(), expected_gradient)
    torch.testing.assert_close(sums.cpu(), expected_sums)
