"""The keep mask of Algorithm 1: laws, then the paper's loop as the judge, then single cases."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from m2po_loop_reference import loop_keep_mask
from token_batches import heavy_tailed

from verl_m2po.second_moment import (
    TrustRegionSearch,
    find_trust_region,
    fixed_point,
    keep_mask,
    rule,
    search,
    trust_region_magnitude,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def mean_square_of_kept(log_ratio, advantages, response_mask, keep):
    inside = keep & (torch.sign(advantages) * log_ratio > 0)
    return log_ratio[inside].double().square().mean().item() if inside.any() else 0.0


# Values whose squares sum to exactly representable numbers, so that means hit thresholds exactly, and ordinary ones.
numbers = st.one_of(
    st.sampled_from([0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-20, -1e-20, 1e20, 0.1, 0.2, -0.2]),
    st.floats(-4, 4, width=16),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
tokens = st.lists(
    st.tuples(numbers, st.sampled_from([-1.5, -1.0, 0.0, 1.0, 1e-30]), st.booleans()), min_size=1, max_size=24
).filter(lambda rows: any(response for _, _, response in rows))
thresholds = st.one_of(
    st.sampled_from([0.0, 0.04, 0.0625, 0.25, 0.3, 1.0, 1e-12, 1e-300, 1e6, math.inf]), st.floats(1e-6, 4)
)


@settings(max_examples=600, deadline=None)
@given(rows=tokens, threshold=thresholds, dtype=st.sampled_from(DTYPES), on_host=st.booleans())
@example(rows=[(1.0, 1.0, True), (1e-15, 1.0, True)], threshold=0.5, dtype=torch.float32, on_host=True)
@example(rows=[(0.5, 1.0, True)] * 3, threshold=0.25, dtype=torch.float32, on_host=True)
@example(
    rows=[(0.5, 1.0, True), (-0.5, -1.0, True), (0.1, 1.0, True)], threshold=0.04, dtype=torch.float32, on_host=True
)
def test_equals_the_loop_of_the_paper_in_exact_arithmetic(rows, threshold, dtype, on_host):
    log_ratio, advantages, response = (list(column) for column in zip(*rows, strict=True))
    log_ratio, advantages = torch.tensor(log_ratio, dtype=dtype), torch.tensor(advantages, dtype=dtype)
    response_mask = torch.tensor(response)
    here = mock.patch.object(search, "on_host", lambda tensor: on_host)
    with here, mock.patch.object(rule, "on_host", lambda tensor: on_host):
        keep = keep_mask(log_ratio, advantages, response_mask, threshold)
    assert keep.tolist() == loop_keep_mask(log_ratio.tolist(), advantages.tolist(), response, threshold)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [1e-3, 0.04, 1.0])
def test_equals_the_loop_on_many_tokens(dtype, threshold):
    log_ratio, advantages, response_mask = heavy_tailed(8, 50, seed=3, dtype=dtype)
    keep = keep_mask(log_ratio, advantages, response_mask, threshold)
    flat = [tensor.flatten().tolist() for tensor in (log_ratio, advantages, response_mask)]
    assert keep.flatten().tolist() == loop_keep_mask(*flat, threshold)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.0, 0.01, 0.04, 1.0, math.inf]))
def test_order_does_not_matter(seed, threshold):
    batch = [tensor.flatten() for tensor in heavy_tailed(6, 40, seed)]
    order = torch.randperm(batch[0].numel(), generator=torch.Generator().manual_seed(seed + 1))
    keep = keep_mask(*batch, threshold)
    assert torch.equal(keep_mask(*(tensor[order] for tensor in batch), threshold), keep[order])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), pieces=st.integers(1, 12), threshold=st.sampled_from([0.0, 0.01, 0.04, 1.0]))
def test_split_into_micro_batches_does_not_matter(seed, pieces, threshold):
    batch = heavy_tailed(6, 40, seed)
    whole = find_trust_region([trust_region_magnitude(*batch)], threshold)
    parts = [tensor.tensor_split(pieces) for tensor in batch]
    split = find_trust_region([trust_region_magnitude(*part) for part in zip(*parts, strict=True)], threshold)
    assert split == whole


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.01, 0.04, 1.0]))
def test_kept_mean_is_within_the_threshold_and_nothing_more_would_fit(seed, threshold):
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed)
    keep = keep_mask(log_ratio, advantages, response_mask, threshold)
    assert mean_square_of_kept(log_ratio, advantages, response_mask, keep) <= threshold * (1 + 1e-12)
    dropped = response_mask & ~keep
    if dropped.any():
        # The smallest dropped size, with all of its ties, would lift the mean above the threshold.
        smallest = log_ratio.abs()[dropped].min()
        more = keep | (dropped & (log_ratio.abs() == smallest))
        assert mean_square_of_kept(log_ratio, advantages, response_mask, more) > threshold


def test_only_tokens_beyond_the_threshold_are_dropped_and_all_others_kept():
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=0)
    keep = keep_mask(log_ratio, advantages, response_mask, 0.04)
    dropped = response_mask & ~keep
    assert dropped.any()
    assert (log_ratio[dropped].square() > 0.04).all()
    assert (torch.sign(advantages[dropped]) * log_ratio[dropped] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_tokens_are_dropped_and_change_nothing_else(dtype):
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=1, dtype=dtype)
    broken = torch.zeros_like(response_mask)
    broken[0, 1:4] = broken[3, 7] = broken[5, 0] = response_mask[0, 1:4] = True
    poisoned = log_ratio.clone()
    poisoned[broken] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, math.inf], dtype=dtype)
    without = keep_mask(log_ratio, advantages, response_mask & ~broken, 0.04)
    assert torch.equal(keep_mask(poisoned, advantages, response_mask, 0.04), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [1e76, 1e80, 1e300, 1.7e308])
def test_a_threshold_whose_root_is_no_number_of_the_type_masks_nothing(threshold, dtype):
    log_ratio = torch.tensor([[1.0, -30.0, 300.0, 0.0]], dtype=dtype)
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    assert torch.equal(keep_mask(log_ratio, torch.ones_like(log_ratio), mask, threshold), mask)


def test_infinite_threshold_keeps_every_finite_response_token():
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=2)
    assert torch.equal(keep_mask(log_ratio, advantages, response_mask, math.inf), response_mask)


def test_zero_threshold_drops_exactly_the_trust_region():
    log_ratio, advantages, response_mask = heavy_tailed(6, 40, seed=2)
    inside = response_mask & (torch.sign(advantages) * log_ratio > 0)
    assert torch.equal(keep_mask(log_ratio, advantages, response_mask, 0.0), response_mask & ~inside)


def test_zero_advantage_is_outside_the_trust_region():
    log_ratio = torch.tensor([5.0, -5.0, 0.3])
    keep = keep_mask(log_ratio, torch.tensor([0.0, 0.0, 1.0]), torch.ones(3, dtype=torch.bool), 0.04)
    # 0.09 > 0.04, so the only trust-region token goes, and the huge ones with A = 0 stay.
    assert keep.tolist() == [True, True, False]


def test_reference_values():
    # Squares .01 .04 .36 4: the mean of all is 1.1025 > .3, of the first three .1367 <= .3.
    log_ratio = torch.tensor([0.1, 0.2, 0.6, 2.0])
    ones = torch.ones(4)
    assert keep_mask(log_ratio, ones, ones.bool(), 0.3).tolist() == [True, True, True, False]


def test_ties_go_together():
    # Squares .25 .25 .25 with threshold .2: one alone or two would exceed it as well, so all go.
    log_ratio = torch.tensor([0.5, -0.5, 0.5, 0.0])
    advantages = torch.tensor([1.0, -1.0, 2.0, 1.0])
    assert keep_mask(log_ratio, advantages, torch.ones(4).bool(), 0.2).tolist() == [False, False, False, True]


def test_published_threshold_lies_midway_between_the_tokens_that_it_separates():
    magnitude = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.0])
    region = find_trust_region([magnitude], 0.04)
    assert region.largest_kept == magnitude[0] and region.first_dropped == magnitude[3]
    assert region.threshold_log_ratio == pytest.approx(0.3)


@pytest.mark.parametrize("steps", [0, 1])
def test_published_threshold_separates_neighbouring_floats(steps):
    # The second moment of the smaller is exactly the threshold; the next float above it has to go. The middle of the
    # two would be rounded to the one whose last bit is 0: once the smaller, once the larger.
    kept = torch.tensor(0.5)
    for _ in range(steps):
        kept = torch.nextafter(kept, torch.tensor(1.0))
    dropped = torch.nextafter(kept, torch.tensor(1.0))
    region = find_trust_region([torch.stack([kept, dropped])], kept.item() ** 2)
    assert region.threshold_log_ratio == kept


def test_ten_million_tokens():
    n = 10_000_000
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.19 * torch.randn(n, generator=generator)
    advantages = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    keep = keep_mask(log_ratio, advantages, torch.ones(n, dtype=torch.bool), 0.03)
    squares = log_ratio[advantages * log_ratio > 0].double().square().sort().values
    means = squares.cumsum(0) / torch.arange(1, squares.numel() + 1)
    assert int((~keep).sum()) == int((means > 0.03).sum()) > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"threshold": -0.1}, ValueError, "threshold must be at least 0"),
        ({"threshold": math.nan}, ValueError, "threshold must be at least 0"),
        ({"threshold": "0.04"}, TypeError, "threshold must be a number"),
        ({"advantages": torch.ones(4)}, ValueError, r"advantages has shape \(4,\)"),
        ({"response_mask": torch.ones(1, 3).bool()}, ValueError, r"response_mask has shape \(1, 3\)"),
        ({"advantages": torch.ones(3).double()}, TypeError, "advantages has dtype torch.float64"),
        ({"log_ratio": torch.ones(3).long()}, TypeError, "log_ratio must be floating point"),
        ({"log_ratio": [0.1, 0.2, 0.3]}, TypeError, "log_ratio must be a tensor"),
        ({"log_ratio": torch.ones(3, requires_grad=True)}, ValueError, "log_ratio requires grad"),
        ({"response_mask": torch.zeros(3).bool()}, ValueError, "response_mask selects no token"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {
        "log_ratio": torch.tensor([0.1, 0.2, 0.3]),
        "advantages": torch.ones(3),
        "response_mask": torch.ones(3).bool(),
        "threshold": 0.04,
    }
    with pytest.raises(error, match=message):
        keep_mask(**{**arguments, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 1e-4, 0.01, 0.04, 1.0, 30.0, math.inf])
@pytest.mark.parametrize("rows", [6, 600])
def test_radix_selection_on_an_accelerator_equals_that_on_a_cpu(monkeypatch, rows, dtype, threshold):
    magnitude = trust_region_magnitude(*heavy_tailed(rows, 40, seed=6, dtype=dtype)).flatten()
    region = find_trust_region([magnitude], threshold)
    monkeypatch.setattr(search, "on_host", lambda tensor: False)
    assert find_trust_region(magnitude.split(100), threshold) == region


@pytest.mark.parametrize("error", [-1_000_000, -40, -1, 1, 40, 1_000_000])
def test_sorting_finds_the_token_wherever_rounded_sums_point(monkeypatch, error):
    magnitude = trust_region_magnitude(*heavy_tailed(600, 40, seed=6)).flatten()
    region = find_trust_region([magnitude], 0.04)
    guess = fixed_point.FixedPoint.guess_first_over

    def wrong(units, spent, ascending):
        return min(max(0, guess(units, spent, ascending) + error), ascending.numel())

    monkeypatch.setattr(fixed_point.FixedPoint, "guess_first_over", wrong)
    assert find_trust_region([magnitude], 0.04) == region


def test_search_without_tokens_is_refused():
    with pytest.raises(ValueError, match="No micro-batch"):
        TrustRegionSearch(0.04).solve()


def test_batch_of_padding_drops_nothing():
    region = find_trust_region([torch.zeros(2, 3)], 0.04)
    assert region.threshold_log_ratio == math.inf and region.largest_kept == 0
