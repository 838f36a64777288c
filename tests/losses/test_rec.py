"""The loss `rec`: reference values, its reductions, and its masks against an obvious version."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_losses import evaluate, on_policy, random_tensors, reinforce_gradient, shared_tensors
from torch.testing import assert_close

from verl_m2po.losses.family.rec import MEMBERS, RECConfig

# settings, loss under the token mean
REFERENCE = [
    ({"clip": "none"}, 0.32),
    ({"clip": "none", "weight": "importance_sampling"}, 0.25961),
    ({}, 0.52),
    ({"weight": "importance_sampling"}, 0.247834),
    ({"clip": "two_side"}, 0.2),
    ({"clip": "two_side", "weight": "importance_sampling"}, 0.2),
    ({"clip": "ring"}, 0.2),
    ({"clip_low": 0.6, "clip_high": 2.0}, 0.62),
    ({"clip": "none", "regularizer": "k2"}, 0.3586),
    ({"clip": "none", "regularizer": "forward_kl"}, 0.428),
    ({"clip": "none", "weight": "advantage"}, 1.763003),
]


@pytest.mark.parametrize(("values", "expected"), REFERENCE)
def test_reference_values(values, expected):
    loss, _, _ = evaluate("rec", settings=values)
    assert_close(loss.item(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, [[0, -0.2, -0.2], [0.2, 0, 0]]),
        ({"weight": "importance_sampling"}, [[0, -0.2, -0.089866], [0.329744, 0, 0]]),
    ],
)
def test_reference_gradients(values, expected):
    _, gradient, _ = evaluate("rec", settings=values)
    assert_close(gradient, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("member", "expected"), [("rec_gspo_is", 0.477593), ("rec_gspo_no_is", 0.583333)])
def test_gspo_members(member, expected):
    loss, _, _ = evaluate("rec", loss_agg_mode="seq-mean-token-mean", rec=MEMBERS[member])
    assert_close(loss.item(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_gspo_importance_sampling_has_the_gradient_of_verls_gspo(seed):
    tensors = random_tensors(seed, scale=0.05)
    _, ours, _ = evaluate("rec", tensors, loss_agg_mode="seq-mean-token-mean", rec=MEMBERS["rec_gspo_is"])
    actor = {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}
    _, verls, _ = evaluate("gspo", tensors, loss_agg_mode="seq-mean-token-mean", actor=actor)
    assert_close(ours, verls)


log_ratios = st.floats(-100, 100, allow_nan=False) | st.floats(-1, 1, allow_nan=False)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(log_ratios, st.floats(-3, 3), st.booleans()), min_size=1, max_size=12),
    st.floats(0.01, 0.9),
    st.floats(0.01, 3),
)
def test_one_side_with_importance_sampling_has_the_gradient_of_verls_ppo_clip(tokens, low, high):
    log_ratio, advantages, mask = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    old = torch.full_like(log_ratio, -0.5, dtype=torch.float64)
    tensors = {
        "old_log_prob": old,
        "log_prob": old + log_ratio.double(),
        "advantages": advantages.double(),
        "response_mask": mask,
    }
    values = {"weight": "importance_sampling", "clip_low": low, "clip_high": high}
    _, ours, _ = evaluate("rec", tensors, settings=values, loss_agg_mode="token-sum")
    actor = {"clip_ratio_low": low, "clip_ratio_high": high}
    _, verls, _ = evaluate("vanilla", tensors, loss_agg_mode="token-sum", actor=actor)
    assert_close(ours, verls)


@pytest.mark.parametrize("seed", range(3))
def test_opmd_is_verls_dro(seed):
    tensors = random_tensors(seed)
    ours = evaluate("rec", tensors, settings={"clip": "none", "regularizer": "k2", "coefficient": 0.05})
    verls = evaluate("dro", tensors, dro_beta=0.1)
    assert_close(ours[:2], verls[:2])


@pytest.mark.parametrize("seed", range(3))
def test_without_clip_and_weight_it_is_verls_gpg(seed):
    tensors = random_tensors(seed)
    assert_close(evaluate("rec", tensors, settings={"clip": "none"})[:2], evaluate("gpg", tensors)[:2])


@pytest.mark.parametrize("seed", range(3))
def test_forward_kl_is_reinforce_with_a_shifted_advantage(seed):
    tensors = random_tensors(seed)
    shifted = {**tensors, "advantages": tensors["advantages"] + 0.3}
    regularised = {"clip": "none", "regularizer": "forward_kl", "coefficient": 0.3}
    assert_close(
        evaluate("rec", tensors, settings=regularised)[:2], evaluate("rec", shifted, settings={"clip": "none"})[:2]
    )


@pytest.mark.parametrize("member", sorted(set(MEMBERS) - {"forward_kl"}))
def test_on_policy_every_member_is_reinforce(member):
    tensors = on_policy(random_tensors(1))
    _, gradient, _ = evaluate("rec", tensors, rec=MEMBERS[member])
    assert_close(gradient, reinforce_gradient(tensors))


def test_infinite_temperature_switches_the_weight_off():
    tensors = random_tensors(2)
    weighted = evaluate("rec", tensors, settings={"clip": "none", "weight": "advantage", "temperature": math.inf})
    assert_close(weighted[1], reinforce_gradient(tensors))


def is_kept(clip: str, ratio: float, advantage: float, low=0.2, high=0.2, outer_low=0.6, outer_high=2.0) -> bool:
    """The masks as the paper writes them, one token at a time."""
    inside = 1 - low <= ratio <= 1 + high
    if clip == "one_side":
        return (advantage >= 0 and ratio <= 1 + high) or (advantage <= 0 and ratio >= 1 - low)
    if clip == "two_side":
        return inside
    return inside or (advantage >= 0 and ratio <= 1 - outer_low) or (advantage <= 0 and ratio >= 1 + outer_high)


@pytest.mark.parametrize("clip", ["one_side", "two_side", "ring"])
def test_masks_are_those_of_the_obvious_version(clip):
    ratios = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 2.0, 2.9, 3.1, 3.5]).double()
    for advantage in (-1.0, 1.0):
        tensors = {
            "old_log_prob": torch.full((1, len(ratios)), -2.0).double(),
            "log_prob": -2.0 + ratios.log().unsqueeze(0),
            "advantages": torch.full((1, len(ratios)), advantage).double(),
            "response_mask": torch.ones(1, len(ratios), dtype=torch.bool),
        }
        _, gradient, _ = evaluate("rec", tensors, settings={"clip": clip})
        expected = [is_kept(clip, ratio, advantage) for ratio in ratios.tolist()]
        assert (gradient[0] != 0).tolist() == expected


def test_a_clipped_token_has_exactly_no_gradient():
    tensors = shared_tensors()
    _, gradient, _ = evaluate("rec", tensors, settings={"weight": "importance_sampling"})
    assert gradient[0, 0] == 0 and gradient[1, 1] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip": "both"}, "rec.clip must be one of none, one_side"),
        ({"weight": "is"}, "rec.weight must be one of"),
        ({"clip_low": -0.1}, "rec.clip_low must be a number >= 0, got -0.1"),
        ({"clip": "ring", "outer_clip_low": 0.1}, "rec.outer_clip_low must be a number >= 0.2"),
        ({"temperature": 0}, "rec.temperature must be a number > 0"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RECConfig(**values)
