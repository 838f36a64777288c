"""One law for all losses: what stands on a token that is off the mask, or dropped, changes nothing at all."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_losses import FAMILIES, evaluate, random_tensors

CASES = {
    **FAMILIES,
    "m2po": {"scope": "micro_batch", "threshold": 0.1},
    "m2po_clip": {"threshold": 0.1},
    "no_trust_region": None,
    "opsm": {"delta": 0.05},
}
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
SHAPE = (6, 9)
garbage = st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e300, 0.0])


def answer(name, tensors, mode, weights):
    loss, gradient, metrics = evaluate(
        name, tensors, settings=CASES[name], loss_agg_mode=mode, rollout_is_weights=weights
    )
    return loss, gradient, {key: float(value) for key, value in metrics.items()}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(MODES),
    values=st.lists(garbage, min_size=4, max_size=4),
    is_weighted=st.booleans(),
    is_float_mask=st.booleans(),
)
def test_what_stands_off_the_mask_changes_nothing(name, seed, mode, values, is_weighted, is_float_mask):
    tensors = random_tensors(seed, SHAPE)
    tensors["response_mask"][0, 0] = True
    mask = tensors["response_mask"]
    weights = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    spoiled = {**tensors}
    for key, value in zip(("log_prob", "old_log_prob", "advantages"), values, strict=False):
        spoiled[key] = tensors[key].masked_fill(~mask, value)
    if is_float_mask:
        spoiled["response_mask"] = mask.double()
    given_weights = weights.masked_fill(~mask, values[3]) if is_weighted else None
    expected = answer(name, tensors, mode, weights if is_weighted else None)
    loss, gradient, metrics = answer(name, spoiled, mode, given_weights)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[~mask] == 0).all()
    torch.testing.assert_close((loss, gradient), expected[:2])
    assert metrics == pytest.approx(expected[2])


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("opsm", "mix_ppg")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_stands_on_a_token_without_a_finite_log_ratio_changes_nothing(name, mode, value):
    tensors = random_tensors(3, SHAPE)
    tensors["response_mask"][:, :3] = True
    tensors["log_prob"][:, 1] = math.nan
    weights = torch.ones(SHAPE, dtype=torch.float64)
    expected = answer(name, tensors, mode, weights)
    spoiled = {**tensors, "advantages": tensors["advantages"].clone()}
    spoiled["advantages"][:, 1] = value
    loss, gradient, metrics = answer(name, spoiled, mode, weights.index_fill(1, torch.tensor([1]), value))
    assert loss.isfinite() and (gradient[:, 1] == 0).all()
    torch.testing.assert_close((loss, gradient), expected[:2])
    assert metrics == pytest.approx(expected[2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_on_a_token_that_m2po_masks_changes_nothing(mode, value):
    tensors = random_tensors(4, SHAPE)
    weights = torch.ones(SHAPE, dtype=torch.float64)
    _, gradient, _ = expected = answer("m2po", tensors, mode, weights)
    masked = tensors["response_mask"] & (gradient == 0)
    assert masked.any()
    loss, gradient, metrics = answer("m2po", tensors, mode, weights.masked_fill(masked, value))
    torch.testing.assert_close((loss, gradient), expected[:2])
    assert metrics == pytest.approx(expected[2])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_an_empty_micro_batch_has_an_empty_gradient(name, shape):
    empty = torch.zeros(shape, dtype=torch.float64)
    tensors = {**dict.fromkeys(("log_prob", "old_log_prob", "advantages"), empty), "response_mask": empty.bool()}
    _, gradient, _ = evaluate(name, tensors, settings=CASES[name], loss_agg_mode="token-sum")
    assert gradient.shape == shape
