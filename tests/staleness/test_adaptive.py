"""The laws of the bound that moves: limits, monotone, calm on a calm plant, to its target, the same after a restart."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_m2po.staleness.rule.adaptive import AdaptiveBound, Reason, Signal, Targets

SIGNALS = st.builds(
    Signal,
    masked_share=st.one_of(st.floats(0, 0.05), st.just(float("nan"))),
    second_moment=st.floats(-0.01, 0.2),
    waiting_share=st.floats(0, 1),
)
LIMITS = st.tuples(st.integers(0, 4), st.integers(0, 12)).map(lambda each: (each[0], each[0] + each[1]))
QUIET = Signal(0.0, 0.001, 0.5)
LOADED = Signal(0.03, 0.1, 0.0)


@given(limits=LIMITS, signals=st.lists(SIGNALS, max_size=60))
def test_it_stays_within_its_limits_falls_fast_and_rises_by_one(limits, signals):
    bound = AdaptiveBound(*limits)
    for signal in signals:
        before = bound.bound_steps
        reason = bound.observe(signal)
        assert limits[0] <= bound.bound_steps <= limits[1]
        assert isinstance(bound.bound_steps, int)
        if reason is Reason.LOWERED:
            assert bound.bound_steps == max(limits[0], before // 2) < before
        elif reason is Reason.RAISED:
            assert bound.bound_steps == before + 1
        else:
            assert bound.bound_steps == before


@given(limits=LIMITS, signals=st.lists(SIGNALS, max_size=40), more=st.floats(0, 0.1), last=SIGNALS)
def test_a_larger_signal_gives_no_larger_bound(limits, signals, more, last):
    calm = AdaptiveBound(*limits)
    for signal in signals:
        calm.observe(signal)
    loaded = copy.deepcopy(calm)
    calm.observe(last)
    loaded.observe(Signal(last.masked_share + more, last.second_moment + more, last.waiting_share))
    assert loaded.bound_steps <= calm.bound_steps


@settings(max_examples=50, deadline=None)
@given(limits=LIMITS, slope=st.floats(0, 0.02), waits=st.booleans())
def test_a_plant_that_does_not_change_is_left_alone(limits, slope, waits):
    """The second moment grows with the bound; after a while the bound stands still."""
    bound, moves = AdaptiveBound(*limits), []
    for step in range(1000):
        signal = Signal(0.0, slope * (bound.bound_steps + 1), 0.5 if waits else 0.0)
        if bound.observe(signal) in (Reason.LOWERED, Reason.RAISED):
            moves.append(step)
    assert len([step for step in moves if step > 400]) == 0


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(2, 16))
def test_it_brings_a_drift_that_grows_with_age_to_its_target(seed, most):
    """The policy moves by a random walk each update: the second moment of an age is in proportion to it."""
    rng, bound = random.Random(seed), AdaptiveBound(1, most)
    per_step = 0.018
    loads = []
    for _ in range(80):
        moment = per_step * bound.bound_steps * rng.uniform(0.8, 1.2)
        loads.append(moment / bound.targets.second_moment)
        bound.observe(Signal(0.0, moment, 0.3))
    assert sum(loads[-40:]) / 40 <= 1


def test_it_falls_within_a_few_steps_of_a_disturbance_and_rises_after_it():
    bound = AdaptiveBound(0, 8)
    for _ in range(20):
        bound.observe(QUIET)
    assert bound.bound_steps == 8
    for _ in range(6):
        bound.observe(LOADED)
    assert bound.bound_steps == 1
    for _ in range(4):
        bound.observe(Signal(0.004, 0.01, 0.5))
    for _ in range(80):
        bound.observe(QUIET)
    assert bound.bound_steps == 8


def test_it_does_not_rise_where_the_trainer_does_not_wait():
    bound = AdaptiveBound(0, 4)
    bound.observe(LOADED)
    assert bound.observe(LOADED) is Reason.LOWERED
    for _ in range(40):
        assert bound.observe(Signal(0.0, 0.0, 0.0)) is Reason.HELD


@given(limits=LIMITS, before=st.lists(SIGNALS, max_size=40), after=st.lists(SIGNALS, max_size=40))
def test_a_restart_changes_nothing(limits, before, after):
    straight, stopped = AdaptiveBound(*limits), AdaptiveBound(*limits)
    for signal in before:
        straight.observe(signal)
        stopped.observe(signal)
    resumed = AdaptiveBound(*limits)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for signal in after:
        assert resumed.observe(signal) is straight.observe(signal)
        assert resumed.bound_steps == straight.bound_steps


def test_a_restart_with_other_limits_goes_on_from_the_nearest_bound():
    state = AdaptiveBound(0, 8).state_dict()
    narrower = AdaptiveBound(2, 4)
    narrower.load_state_dict(state)
    assert narrower.bound_steps == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AdaptiveBound(4, 2), "must be 0 to the largest, 2"),
        (lambda: AdaptiveBound(-1, 2), "must be 0 to"),
        (lambda: Targets(masked_share=0.0), "must be positive"),
        (lambda: Targets(quiet=1.0), "between 0 and 1"),
    ],
)
def test_bad_limits_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
