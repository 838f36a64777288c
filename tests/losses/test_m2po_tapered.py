"""The loss `m2po` with tapered weights, the option `loss=m2po_tapered`: its mask is M2PO's, its weights are TOPR's."""

import pytest
import torch
from method_losses import evaluate, on_policy, random_tensors, reinforce_gradient
from torch.testing import assert_close


def tapered(tensors=None, threshold=0.04):
    return evaluate("m2po", tensors, settings={"weight": "tapered", "scope": "micro_batch", "threshold": threshold})


# Of the failed response the second token has (log r)^2 = 1 and is dropped; its ratio is exp(0.5 - 1).
def test_reference_values():
    loss, gradient, _ = tapered()
    expected = torch.tensor([[-1.0] * 3, [0.606531, 0, 0]], dtype=torch.float64) / 5
    assert_close(gradient, expected, atol=1e-6, rtol=0)
    assert loss.item() == pytest.approx((0.5 + 1 + 2 - 0.4 * 0.606531) / 5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_without_a_threshold_it_is_topr(seed):
    tensors = random_tensors(seed)
    assert_close(tapered(tensors, float("inf"))[1], evaluate("topr", tensors)[1])


@pytest.mark.parametrize("seed", range(3))
def test_it_keeps_the_tokens_that_m2po_keeps(seed):
    tensors = random_tensors(seed)
    _, ours, _ = tapered(tensors)
    _, plain, _ = evaluate("m2po", tensors, settings={"scope": "micro_batch"})
    assert ((ours == 0) == (plain == 0)).all() and (ours == 0).any()


def test_on_policy_it_is_reinforce():
    tensors = on_policy(random_tensors(1))
    assert_close(tapered(tensors)[1], reinforce_gradient(tensors))


def test_an_unknown_weight_is_refused_by_name():
    with pytest.raises(ValueError, match=r"m2po.weight must be one of ratio, tapered, got 'flat'"):
        evaluate("m2po", settings={"weight": "flat"})
