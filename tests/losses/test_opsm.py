"""Off-policy sequence masking, in our losses and around verl's."""

from itertools import pairwise

import pytest
import torch
from method_losses import FAMILIES, evaluate, random_tensors, shared_tensors
from torch.testing import assert_close

from verl_m2po.losses.kernel.sequence_mask import sequence_keep_mask

# `m2po` decides for itself here: nobody opens a mini-batch around it.
OURS = {
    **FAMILIES,
    "m2po": {"scope": "micro_batch", "threshold": 0.3},
    "m2po_clip": {"threshold": 0.3},
    "no_trust_region": None,
}


@pytest.mark.parametrize(("delta", "expected"), [(0.2, -0.529866), (0.3, -0.040122)])
def test_reference_values_around_verls_ppo(delta, expected):
    loss, _, _ = evaluate("opsm", opsm={"delta": delta})
    assert_close(loss.item(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["vanilla", "gspo", "cispo", "sapo", "gpg", "dppo_tv", "dro", "geo_mean"])
def test_around_verls_losses_masked_responses_have_no_gradient_and_the_others_their_own(base):
    tensors = random_tensors(11)
    extra = {"dro_beta": 0.1} if base == "dro" else {}
    keep = kept(tensors, 0.05)
    assert not keep.all()
    _, masked, metrics = evaluate("opsm", tensors, opsm={"delta": 0.05, "base": base}, **extra)
    _, plain, _ = evaluate(base, tensors, **extra)
    assert_close(masked, torch.where(keep, plain, 0.0))
    assert metrics["actor/opsm/masked_tokens_per_micro_batch"] == (tensors["response_mask"] & ~keep).sum()


@pytest.mark.parametrize("name", OURS)
def test_in_our_losses_masked_responses_have_no_gradient_and_the_others_their_own(name):
    tensors = random_tensors(11)
    keep = kept(tensors, 0.05)
    _, masked, _ = evaluate(name, tensors, settings=OURS[name], opsm={"delta": 0.05})
    _, plain, _ = evaluate(name, tensors, settings=OURS[name])
    assert_close(masked, torch.where(keep, plain, 0.0))
    assert not torch.equal(masked, plain)


@pytest.mark.parametrize("name", ["rec", "topr"])
def test_both_ways_give_the_same_loss(name):
    tensors = random_tensors(12)
    inside = evaluate(name, tensors, opsm={"delta": 0.05})
    around = evaluate("opsm", tensors, opsm={"delta": 0.05, "base": name})
    assert_close(inside[:2], around[:2])


def kept(tensors, delta):
    log_ratio = tensors["log_prob"] - tensors["old_log_prob"]
    return sequence_keep_mask(log_ratio, tensors["advantages"], tensors["response_mask"], delta)


@pytest.mark.parametrize("seed", range(3))
def test_positive_responses_are_never_masked(seed):
    tensors = random_tensors(seed, scale=5.0)
    assert kept(tensors, 0.0)[tensors["advantages"] >= 0].all()


def test_an_infinite_delta_masks_nothing_and_a_larger_one_never_more():
    tensors = random_tensors(3, scale=3.0)
    masks = [kept(tensors, delta) for delta in (0.0, 0.1, 1.0, float("inf"))]
    assert masks[-1].all()
    for narrow, wide in pairwise(masks):
        assert (narrow <= wide).all()


def test_padding_does_not_count():
    tensors = shared_tensors()
    tensors["log_prob"][1, 2] = -1000.0
    assert kept(tensors, 0.3).all()


def test_the_loss_without_delta_is_refused():
    with pytest.raises(ValueError, match=r"opsm.delta: set it, or select vanilla"):
        evaluate("opsm")


def test_around_itself_is_refused():
    with pytest.raises(ValueError, match=r"opsm.base must be another loss"):
        evaluate("opsm", opsm={"delta": 0.1, "base": "opsm"})
