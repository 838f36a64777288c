"""The rules, driven by random traces: no violated bound, no deadlock, nothing lost, doubled or starved."""

import json
import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Trace, Workload

from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.records import Row
from verl_m2po.staleness.rule.rules import StalenessViolation, UnknownGroup
from verl_m2po.staleness.rule.units import UpdateClock, UpdateCount, exact_version

pytestmark = pytest.mark.slow


def short(rng: random.Random) -> float:
    return rng.uniform(5, 50)


def long_tail(rng: random.Random) -> float:
    """Median 20 tokens, one in a hundred above 600: several trainer steps."""
    return math.exp(rng.gauss(math.log(20), 1.5))


def assert_nothing_is_doubled(trace: Trace) -> None:
    uids = Counter(group.ticket.uid for _, _, group in trace.trained)
    assert uids.most_common(1)[0][1] == 1


def assert_nothing_is_lost(simulation: Simulation) -> None:
    """Whatever was started was trained, or is counted under the reason why it was not; at the end nothing is left."""
    trace = simulation.trace
    assert simulation.dispatched == len(trace.trained) + trace.ended.total()
    assert simulation.rule.depth == 0


def assert_exact(trace: Trace, k_steps: int, batch_size: int, steps: int) -> None:
    assert len(trace.trained) == steps * batch_size
    assert_nothing_is_doubled(trace)
    for i, (version, _, group) in enumerate(trace.trained):
        assert version == i // batch_size
        assert group.ticket.place == i
        assert {v for row in group.rows for v, _ in row.spans} == {exact_version(version, k_steps)}


def assert_bounded(trace: Trace, bound: int, batch_size: int, steps: int) -> None:
    assert len(trace.trained) == steps * batch_size
    assert_nothing_is_doubled(trace)
    for version, oldest_version, group in trace.trained:
        spans = [span for row in group.rows for span in row.spans]
        kept = [(v, tokens) for v, tokens in spans if oldest_version is None or v >= oldest_version]
        assert sum(tokens for _, tokens in kept), "a group was trained with every token masked"
        # Of masked copies too: they are of no other age than what they copy.
        assert all(version - bound <= v <= version for v, _ in kept)


workloads = st.builds(
    Workload,
    length=st.sampled_from([short, long_tail]),
    tokens_per_time=st.sampled_from([20.0, 100.0, 1000.0]),
    fail_share=st.sampled_from([0.0, 0.1, 0.5]),
    mask_share=st.sampled_from([0.0, 0.3]),
    train_time=st.sampled_from([0.0, 0.2, 1.0]),
    overlaps=st.booleans(),
)


def check_exact_stale(
    k: int, parts: int, workload: Workload, seed: int, steps: int, batch_size: int = 4, most: int | None = None
) -> None:
    simulation = Simulation(ExactStale(k, batch_size, most), workload, seed, parts)
    trace = simulation.run(steps)
    assert_exact(trace, k, batch_size, steps)
    assert_nothing_is_lost(simulation)
    assert trace.max_depth <= (k + 1) * batch_size
    assert most is None or trace.max_in_flight <= most


def check_bounded_async(
    bound: int, parts: int, share: float, workload: Workload, seed: int, steps: int, batch_size: int = 4
) -> None:
    simulation = Simulation(BoundedAsync(bound, batch_size, share), workload, seed, parts)
    trace = simulation.run(steps)
    assert_bounded(trace, bound, batch_size, steps)
    assert_nothing_is_lost(simulation)
    assert trace.max_depth <= (bound + 1) * batch_size
    # Nothing starves: what has ended is trained after at most bound + 1 further steps, however long it took.
    assert max(version - group.max_version for version, _, group in trace.trained) <= bound + 1


exact_cases = given(
    k=st.integers(0, 9), parts=st.sampled_from([1, 2, 4]), workload=workloads, seed=st.integers(0, 2**32)
)
bounded_cases = given(
    bound=st.integers(0, 9),
    parts=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    workload=workloads,
    seed=st.integers(0, 2**32),
)


@settings(max_examples=60, deadline=None)
@exact_cases
def test_exact_stale_is_exact_whatever_happens(k, parts, workload, seed):
    check_exact_stale(k, parts, workload, seed, steps=30)


@settings(max_examples=30, deadline=None)
@exact_cases
def test_exact_stale_is_exact_however_few_are_generated_at_a_time(k, parts, workload, seed):
    check_exact_stale(k, parts, workload, seed, steps=30, most=1 + seed % 5)


@settings(max_examples=60, deadline=None)
@bounded_cases
def test_bounded_async_is_bounded_whatever_happens(bound, parts, share, workload, seed):
    check_bounded_async(bound, parts, share, workload, seed, steps=30)


@settings(max_examples=10, deadline=None)
@exact_cases
def test_exact_stale_is_exact_over_100_000_steps(k, parts, workload, seed):
    check_exact_stale(k, parts, workload, seed, steps=10_000)


@settings(max_examples=10, deadline=None)
@bounded_cases
def test_bounded_async_is_bounded_over_100_000_steps(bound, parts, share, workload, seed):
    check_bounded_async(bound, parts, share, workload, seed, steps=10_000)


def test_exact_stale_for_100_000_steps_in_a_row():
    check_exact_stale(16, 1, Workload(length=long_tail, fail_share=0.05, rows=1), 16, steps=100_000, batch_size=2)


@pytest.mark.parametrize(("bound", "share"), [(0, 0.25), (4, 0.25)])
def test_bounded_async_for_100_000_steps_in_a_row(bound, share):
    workload = Workload(length=long_tail, fail_share=0.05, rows=1)
    check_bounded_async(bound, 1, share, workload, bound, steps=100_000, batch_size=2)


@settings(max_examples=40, deadline=None)
@given(bound=st.integers(1, 6), train_time=st.sampled_from([0.1, 1.0, 5.0]), seed=st.integers(0, 2**32))
def test_pacing_alone_keeps_quick_generations_within_the_bound(bound, train_time, seed):
    """Whatever the ratio of speeds: a generation that ends within the step it starts in is never masked or dropped."""
    workload = Workload(length=lambda rng: rng.uniform(1, 10), tokens_per_time=1000.0, train_time=train_time)
    trace = Simulation(BoundedAsync(bound, 4, 1.0), workload, seed).run(50)
    assert not trace.ended
    assert all(oldest is None for _, oldest, _ in trace.trained)


def test_slow_training_uses_the_whole_bound_and_no_more():
    workload = Workload(length=lambda rng: 1, tokens_per_time=1e6, train_time=1.0)
    trace = Simulation(BoundedAsync(3, 4), workload, seed=0).run(50)
    ages = [version - group.min_version for version, _, group in trace.trained[4 * 10 :]]
    assert set(ages) == {3}


def drop_rate_by_decile(trace: Trace) -> list[float]:
    ordered = sorted(trace.all_lengths)
    dropped = sorted(trace.dropped_lengths)
    edges = [ordered[len(ordered) * i // 10] for i in range(1, 10)]
    per_decile = Counter(sum(length >= edge for edge in edges) for length in dropped)
    return [per_decile[i] / (len(ordered) / 10) for i in range(10)]


def test_long_answers_are_not_dropped_more_often_where_masking_is_allowed():
    """Answers of up to many times the bound; with min_usable_share=0 none is lost, dropping loses the longest."""
    workload = Workload(length=long_tail, rows=1)
    masking = Simulation(BoundedAsync(2, 8, 0.0), workload, seed=1).run(3000)
    dropping = Simulation(BoundedAsync(2, 8, 1.0), workload, seed=1).run(3000)
    assert drop_rate_by_decile(masking) == [0.0] * 10
    rates = drop_rate_by_decile(dropping)
    assert rates[-1] > 0.1 and rates[:8] == [0.0] * 8
    mean = {
        name: sum(group.generated_tokens for *_, group in trace.trained) / len(trace.trained)
        for name, trace in (("masking", masking), ("dropping", dropping))
    }
    unbiased = sum(masking.all_lengths) / len(masking.all_lengths)
    assert mean["masking"] == pytest.approx(unbiased, rel=0.02)
    assert mean["dropping"] < 0.9 * unbiased


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from([lambda: ExactStale(3, 4), lambda: BoundedAsync(3, 4, 0.25)]),
    stop_at=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_a_restored_rule_continues_as_the_uninterrupted_one(rule, stop_at, seed):
    workload = Workload(length=long_tail, fail_share=0.1)

    def run(is_interrupted: bool) -> Trace:
        simulation = Simulation(rule(), workload, seed)
        simulation.rule.limit(25)
        for step in range(1, 26):
            simulation._train(step)
            if is_interrupted and step == stop_at:
                state = json.loads(json.dumps(simulation.rule.state_dict()))
                simulation.rule = rule()
                simulation.rule.limit(25)
                simulation.rule.load_state_dict(state)
        return simulation.trace

    assert run(is_interrupted=True) == run(is_interrupted=False)


def test_resuming_under_another_schedule_is_refused_by_name():
    state = ExactStale(3, 4).state_dict()
    with pytest.raises(ValueError, match=r"staleness_steps=3, this run has staleness_steps=2"):
        ExactStale(2, 4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"batch_size=4, this run has batch_size=8"):
        ExactStale(3, 8).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rule='exact_stale', this run has rule='bounded_async'"):
        BoundedAsync(3, 4).load_state_dict(state)


def test_a_run_that_was_to_end_cannot_be_made_longer_at_the_same_staleness():
    """At its last step nothing is generated any more; batch 4 would have needed the weights of step 2."""
    simulation = Simulation(ExactStale(2, 4), Workload(length=short), seed=0)
    simulation.run(4)
    for total_steps, is_refused in ((4, False), (8, True)):
        longer = ExactStale(2, 4)
        longer.limit(total_steps)
        longer.load_state_dict(simulation.rule.state_dict())
        if is_refused:
            with pytest.raises(StalenessViolation, match="was to end at trainer step 4"):
                longer.check_resumable(4)
        else:
            longer.check_resumable(4)


def row(version: int, key: str = "a_0_0") -> Row:
    return Row(key, 1, 3, ((version, 3),))


def test_exact_stale_refuses_a_row_of_another_version():
    rule = ExactStale(1, 1)
    rule.admit("a", 0)
    with pytest.raises(StalenessViolation, match="batch 0 must come from weight version 0, but row a_0_0"):
        rule.finish("a", (row(1),))


def test_exact_stale_refuses_a_row_that_crosses_a_weight_update():
    rule = ExactStale(1, 1)
    rule.admit("a", 0)
    with pytest.raises(StalenessViolation, match="spans"):
        rule.finish("a", (Row("a_0_0", 1, 3, ((0, 1), (1, 2))),))


def test_exact_stale_refuses_weights_that_moved_too_early():
    rule = ExactStale(0, 2)
    rule.admit("a", 0)
    assert not rule.settled(0)
    with pytest.raises(StalenessViolation, match="batch 0 must come from weight version 0"):
        rule.admit("b", 1)


def test_a_failed_group_is_replaced_in_its_own_place():
    rule = ExactStale(0, 2)
    rule.admit("a", 0)
    rule.admit("b", 0)
    rule.finish("b", (row(0, "b_0_0"),))
    rule.fail("a")
    assert rule.admissible(0) == 1 and not rule.settled(0)
    assert rule.admit("c", 0).place == 0
    rule.finish("c", (row(0, "c_0_0"),))
    assert [group.ticket.uid for group in rule.select(0, 2).groups] == ["c", "b"]


@pytest.mark.parametrize("rule", [ExactStale(1, 2), BoundedAsync(1, 2)], ids=lambda rule: rule.name)
def test_a_result_of_no_group_in_flight_is_refused(rule):
    rule.admit("a", 0)
    rule.finish("a", (row(0),))
    with pytest.raises(UnknownGroup):
        rule.finish("a", (row(0),))
    with pytest.raises(UnknownGroup):
        rule.fail("never admitted")


def test_over_age_tokens_are_masked_and_hopeless_groups_dropped():
    rule = BoundedAsync(1, 1, min_usable_share=0.5)
    rule.admit("mostly old", 0)
    rule.admit("mostly new", 0)
    rule.finish("mostly old", (Row("o_0_0", 1, 10, ((0, 8), (3, 2))),))
    rule.finish("mostly new", (Row("n_0_0", 1, 10, ((0, 2), (3, 8))),))
    selection = rule.select(3, 1)
    assert [group.ticket.uid for group in selection.groups] == ["mostly new"]
    assert [group.ticket.uid for group in selection.evicted] == ["mostly old"]
    assert selection.oldest_version == 2


def test_what_cannot_be_used_any_more_is_aborted():
    """A share of (bound + 1) / (age + 1): with a bound of 1, half of the tokens are left at age 3, a quarter at 7."""
    rule = BoundedAsync(1, 1, min_usable_share=0.25)
    rule.admit("a", 0)
    assert rule.expired(7) == []
    assert rule.expired(8) == ["a"]
    assert BoundedAsync(1, 1, min_usable_share=0.0).expired(10**6) == []


@pytest.mark.parametrize(("made", "configured"), [(4, 2), (2, 1), (3, 2)])
def test_an_exact_age_ends_at_the_first_step_that_makes_other_updates(made, configured):
    with pytest.raises(StalenessViolation, match=rf"step 5 would make {made} .*64 rows.* {configured}.*bounded_async"):
        ExactStale(1, 8).check_updates(5, 64, made, configured)
    ExactStale(1, 8).check_updates(5, 64, configured, configured)
    ExactStale(0, 8).check_updates(5, 64, made, configured)  # what is on-policy stays so
    BoundedAsync(1, 8).check_updates(5, 64, made, configured)


@settings(max_examples=30, deadline=None)
@given(factor=st.integers(1, 4), k=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_the_bound_holds_in_the_updates_that_are_really_made(factor, k, seed):
    """Steps make `factor` times the configured updates; a crowd of slow groups would be over age otherwise."""
    clock = UpdateClock(8, 4)
    count = UpdateCount(clock)
    rule = BoundedAsync(k, 8, min_usable_share=0.25, updates=count)
    simulation = Simulation(rule, Workload(length=lambda rng: rng.paretovariate(1.0) * 40), seed)
    rule.limit(12)
    for step in range(1, 13):
        simulation._train(step)
        count.add(step, factor * clock.updates_per_step)
    assert len(simulation.trace.trained) == 12 * 8
    for version, oldest, group in simulation.trace.trained:
        trained = [v for row in group.rows for v, _ in row.spans if oldest is None or v >= oldest]
        assert count.between(min(trained), version) <= clock.updates(k)
