"""The loss `bapo`: reference values, its limits, and its search against the obvious loop."""

import dataclasses
import math

import pytest
import torch
from method_losses import evaluate, random_tensors, shared_tensors
from torch.testing import assert_close

from verl_m2po.losses.family.bapo import BAPOConfig, BoundsSearch, choose_bounds, loss_sums
from verl_m2po.losses.kernel.mini_batch import MiniBatch, training
from verl_m2po.losses.kernel.tokens import Tokens, tokens_of

# Outside the actor worker every call decides for itself.
ALONE = {"scope": "micro_batch"}
CODE = {"weight": "none", "order": "low_first", **ALONE}


def tokens(tensors) -> Tokens:
    return tokens_of(**tensors)


def decide(tensors, settings: BAPOConfig) -> tuple[float, float, float]:
    seen = tokens(tensors)
    positive, negative = loss_sums(seen, settings)
    low, high, share = choose_bounds(positive, negative, settings)
    return low.item(), high.item(), share.item()


def ratio_of(share: float) -> float:
    return share / (1 - share)


def test_reference_values_of_the_released_code():
    start = BAPOConfig(**CODE, positive_share=0.5, low_end=0.8, high_end=2.0)
    low, high, share = decide(shared_tensors(), start)
    assert (low, high) == (0.6, 1.2)
    assert_close(ratio_of(share), 1.178149, atol=1e-6, rtol=0)
    loss, _, _ = evaluate("bapo", bapo=start)
    assert_close(loss.item(), -0.080122, atol=1e-6, rtol=0)
    # Its target 1.2 is the share 1.2 / 2.2.
    missed = BAPOConfig(**CODE, positive_share=1.2 / 2.2, low_end=0.8, high_end=2.0)
    low, high, share = decide(shared_tensors(), missed)
    assert_close((low, high, ratio_of(share)), (0.8, 2.0, 1.090664), atol=1e-6, rtol=0)
    loss, _, _ = evaluate("bapo", bapo=missed)
    assert_close(loss.item(), -0.044402, atol=1e-6, rtol=0)


def test_reference_value_of_the_papers_rule():
    low, high, share = decide(shared_tensors(), BAPOConfig())
    assert (low, high) == (0.6, 1.2)
    assert_close(share, 0.515206, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(4))
def test_with_equal_start_and_end_it_is_verls_asymmetric_clip(seed):
    tensors = random_tensors(seed)
    fixed = {"low_start": 0.8, "low_end": 0.8, "high_start": 1.28, "high_end": 1.28, "positive_share": 0.9, **ALONE}
    verls = evaluate("vanilla", tensors, actor={"clip_ratio_low": 0.2, "clip_ratio_high": 0.28})
    assert_close(evaluate("bapo", tensors, settings=fixed)[:2], verls[:2])


@pytest.mark.parametrize("seed", range(4))
def test_with_dual_clip_too(seed):
    tensors = random_tensors(seed, scale=1.0)
    fixed = {"low_start": 0.8, "low_end": 0.8, "high_start": 1.2, "high_end": 1.2, "dual_clip": 3.0, **ALONE}
    verls = evaluate("vanilla", tensors, actor={"clip_ratio_c": 3.0})
    assert_close(evaluate("bapo", tensors, settings=fixed)[:2], verls[:2])


@pytest.mark.parametrize("seed", range(3))
def test_share_zero_never_moves_the_bounds(seed):
    assert decide(random_tensors(seed), BAPOConfig(positive_share=0))[:2] == (0.6, 1.2)


def loop(tensors, settings: BAPOConfig) -> tuple[float, float]:
    """The search as one would write it down: widen one bound a step at a time until the share is there."""
    low, high = settings.low_start, settings.high_start

    def share() -> float:
        positive = negative = 0.0
        seen = tokens(tensors)
        for index in seen.mask.nonzero().tolist():
            row, column = index
            ratio = seen.log_ratio[row, column].exp().item()
            advantage = seen.advantages[row, column].item()
            weight = tensors["old_log_prob"][row, column].exp().item()
            if settings.weight == "none":
                weight = 1.0
            if advantage > 0:
                positive += weight * abs(advantage * min(ratio, high))
            else:
                negative += weight * abs(advantage * max(ratio, low))
        return positive / (positive + negative) if positive + negative else 1.0

    def widen_high(high: float) -> float:
        return min(high + settings.high_step, settings.high_end)

    def widen_low(low: float) -> float:
        return min(low + settings.low_step, settings.low_end)

    while share() < settings.positive_share and (low < settings.low_end or high < settings.high_end):
        if settings.order == "high_first":
            low, high = (low, widen_high(high)) if high < settings.high_end else (widen_low(low), high)
        else:
            low, high = (widen_low(low), high) if low < settings.low_end else (low, widen_high(high))
    return low, high


@pytest.mark.parametrize("order", ["high_first", "low_first"])
@pytest.mark.parametrize("weight", ["behaviour_probability", "none"])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.7])
def test_the_search_is_that_of_the_loop(order, weight, share):
    for seed in range(6):
        tensors = random_tensors(seed, shape=(4, 5), scale=1.0)
        settings = BAPOConfig(positive_share=share, order=order, weight=weight, high_step=0.25, low_step=0.1)
        assert_close(decide(tensors, settings)[:2], loop(tensors, settings), atol=1e-9, rtol=0)


def test_a_higher_lower_bound_only_lowers_the_share():
    tensors = random_tensors(1, scale=1.0)
    settings = BAPOConfig()
    seen = tokens(tensors)
    positive, negative = loss_sums(seen, settings)
    assert (negative.diff() >= 0).all() and (positive.diff() >= 0).all()


@pytest.mark.parametrize("share", [0.2, 0.4, 0.5, 0.7])
def test_micro_batches_that_decide_together_decide_as_one(share):
    tensors, settings = random_tensors(2, scale=1.0), BAPOConfig(positive_share=share)
    together, parts = BoundsSearch(settings), (slice(0, 2), slice(2, 6))
    for rows in parts:
        together.add(tokens({key: value[rows] for key, value in tensors.items()}))
    whole = BoundsSearch(settings).add(tokens(tensors)).solve()
    assert_close(together.solve(), whole)
    with training(MiniBatch(decision=whole)):
        gradients = [evaluate("bapo", {k: v[rows] for k, v in tensors.items()}, bapo=settings)[1] for rows in parts]
    _, expected, _ = evaluate("bapo", tensors, bapo=dataclasses.replace(settings, scope="micro_batch"))
    # Each part was averaged over its own tokens.
    counts = [tensors["response_mask"][rows].sum() for rows in parts]
    parts_of_whole = [gradient * count for gradient, count in zip(gradients, counts, strict=True)]
    assert_close(torch.cat(parts_of_whole) / sum(counts), expected)


def test_without_the_actor_worker_the_mini_batch_is_refused():
    with pytest.raises(RuntimeError, match=r"bapo\.scope=mini_batch needs the actor worker .*M2POTrainingWorker"):
        evaluate("bapo", bapo=BAPOConfig())


def test_the_grid_ends_at_its_end():
    assert BAPOConfig(high_start=1.2, high_end=1.45, high_step=0.1).highs() == pytest.approx([1.2, 1.3, 1.4, 1.45])
    assert BAPOConfig().lows() == pytest.approx([0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9])


def test_metrics_tell_the_bounds():
    _, _, metrics = evaluate("bapo", settings=ALONE)
    assert {"actor/bapo/ratio_low", "actor/bapo/ratio_high", "actor/bapo/positive_share"} <= set(metrics)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positive_share": 1}, "bapo.positive_share must be a number >= 0 < 1, got 1"),
        ({"order": "paper"}, "bapo.order must be one of high_first, low_first"),
        ({"low_end": 0.5}, "bapo.low_end must be a number >= 0.6, got 0.5"),
        ({"high_step": 0}, "bapo.high_step must be a number > 0, got 0"),
        ({"high_start": math.inf, "high_end": math.inf}, "bapo.high_end must be finite"),
        ({"high_step": math.inf}, "bapo.high_step must be finite"),
        ({"scope": "batch"}, "bapo.scope must be one of mini_batch, micro_batch, got 'batch'"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        BAPOConfig(**values)
