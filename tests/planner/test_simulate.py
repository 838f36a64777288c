"""The laws of a simulated run."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_m2po.planner.fleet import Fleet
from verl_m2po.planner.simulate import MODES, Setting, simulate
from verl_m2po.planner.workload import (
    EngineCurve,
    Failures,
    Generation,
    MeasuredLengths,
    PlanError,
    QuantileLengths,
    Training,
    Workload,
)

FAST = 1e9


def workload(
    tokens_per_s: float = 100.0,
    step_s: float = 10.0,
    push_s: float = 0.0,
    servers: int = 4,
    lengths=None,
    max_requests: int = 64,
    **more,
) -> Workload:
    # Every request has the same speed, however many there are: a server of so many slots.
    curve = EngineCurve(((1, tokens_per_s), (max_requests, tokens_per_s * max_requests)), max_requests)
    lengths = lengths or MeasuredLengths([[200] * 4])
    return Workload(8, 4, lengths, Generation(servers, curve), Training(step_s, push_s=push_s), **more)


TAIL = QuantileLengths({0.5: 100, 0.9: 400}, 1600)
SETTINGS = st.builds(
    Setting, mode=st.sampled_from(["stale_k", "stale_k_separate", "bounded_async"]), staleness_steps=st.integers(0, 4)
)


@pytest.mark.parametrize("mode", MODES)
def test_an_unlimited_generator_gives_the_training_time(mode):
    setting = Setting(mode, 0 if mode == "sync" else 2)
    outcome = simulate(setting, workload(tokens_per_s=FAST, push_s=1.5), steps=5)
    assert outcome.mean_step_s == pytest.approx(10 + 1.5, rel=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_an_unlimited_trainer_gives_the_generation_time(mode):
    setting = Setting(mode, 0 if mode == "sync" else 2)
    outcome = simulate(setting, workload(step_s=0.0, max_requests=8), steps=5)
    # The servers are full with one batch: 32 responses of 200 tokens at 100 tokens/s.
    assert outcome.mean_step_s == pytest.approx(2.0)
    assert outcome.servers_idle < 1e-6


@pytest.mark.parametrize("mode", ["sync", "stale_k"])
def test_shared_devices_cost_the_sum(mode):
    outcome = simulate(Setting(mode, 0 if mode == "sync" else 3), workload(push_s=0.5), steps=5)
    assert outcome.mean_step_s == pytest.approx(2.0 + 10 + 0.5)
    assert outcome.trainer_idle == pytest.approx(2.0 / 12.5)


def test_separate_devices_cost_the_larger():
    assert simulate(Setting("stale_k_separate", 1), workload(), steps=5).mean_step_s == pytest.approx(10.0)
    slow = workload(tokens_per_s=10.0)
    assert simulate(Setting("stale_k_separate", 1), slow, steps=5).mean_step_s == pytest.approx(20.0)


def test_bounded_async_waits_for_no_single_response():
    lengths = QuantileLengths({0.5: 100, 0.9: 300, 0.99: 1500}, 1600)
    tail = workload(step_s=1.0, lengths=lengths, max_requests=4)
    exact = simulate(Setting("stale_k_separate", 2), tail, steps=20)
    bounded = simulate(Setting("bounded_async", 2), tail, steps=20)
    assert bounded.mean_step_s < 0.8 * exact.mean_step_s


@settings(max_examples=25, deadline=None)
@given(setting=SETTINGS, step_s=st.floats(0, 20), seed=st.integers(0, 5))
def test_ages_are_within_the_rules_bound(setting, step_s, seed):
    outcome = simulate(setting, workload(step_s=step_s, lengths=TAIL, push_s=0.2), steps=4, seed=seed)
    assert outcome.largest_age <= setting.staleness_steps
    if setting.mode != "bounded_async":
        assert set(outcome.age_tokens) == {setting.staleness_steps}
        assert outcome.masked_tokens == outcome.dropped_tokens == 0


@settings(max_examples=15, deadline=None)
@given(setting=SETTINGS, seed=st.integers(0, 5), share=st.sampled_from([0.0, 0.2]))
def test_every_step_trains_a_batch_and_the_queue_is_as_deep_as_the_rule_allows(setting, seed, share):
    failing = workload(lengths=TAIL, failures=Failures(group_share=share))
    outcome = simulate(setting, failing, steps=4, seed=seed)
    assert outcome.trained_groups == 4 * 8
    assert outcome.deepest <= (setting.staleness_steps + 1) * 8
    assert (outcome.dropped_tokens > 0) == (share > 0) or setting.mode == "bounded_async"


@settings(max_examples=10, deadline=None)
@given(setting=SETTINGS, seed=st.integers(0, 100))
def test_the_same_seed_gives_the_same_numbers(setting, seed):
    breaking = Failures(server_per_s=1e-3, trainer_per_s=1e-3, heals=True, rejoin_s=50)
    runs = [simulate(setting, workload(lengths=TAIL, failures=breaking), steps=4, seed=seed) for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_failures_cost_time_and_break_no_promise(mode, heals):
    breaking = Failures(server_per_s=1e-2, heals=heals, rejoin_s=60, restart_s=100, checkpoint_steps=4)
    setting = Setting(mode, 0 if mode == "sync" else 2)
    whole = simulate(setting, workload(lengths=TAIL), steps=30)
    broken = simulate(setting, workload(lengths=TAIL, failures=breaking), steps=30)
    if heals and not setting.is_shared:
        assert broken.server_failures > 0
        assert broken.restarts == 0
    else:
        assert broken.restarts > 0
    assert broken.largest_age <= setting.staleness_steps
    assert broken.mean_step_s >= whole.mean_step_s - 1e-9
    assert broken.trained_groups == 30 * 8


def test_no_token_is_lost_where_the_weights_change_in_the_middle_of_a_response():
    fleet = Fleet(Generation(1, EngineCurve(((1, 10.0), (2, 20.0)), 2)), seed=0)
    fleet.start(0, [100, 40])
    assert fleet.run(3.0) == []
    fleet.new_weights(1, 0)
    # 30 tokens each by the base model, then 70 and 10.
    assert fleet.run(math.inf) == [(0, {0: 60, 1: 80})]
    assert fleet.now == pytest.approx(10.0)


def test_requests_share_a_server_by_its_curve_and_wait_beyond_its_slots():
    # One request at 10 tokens/s, two at 6 each, a third waits.
    fleet = Fleet(Generation(1, EngineCurve(((1, 10.0), (2, 12.0)), 2)), seed=0)
    for group, length in enumerate((60, 30, 10)):
        fleet.start(group, [length])
    ends = []
    while whole := fleet.run(math.inf):
        ends.append(([group for group, _ in whole], round(fleet.now, 6)))
    # 30 tokens at 6/s end at 5 s; 10 more at 6/s at 5 + 10/6; then the first has 20 left, at 10/s.
    assert ends == [([1], 5.0), ([2], round(5 + 10 / 6, 6)), ([0], round(5 + 10 / 6 + 2, 6))]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    pushes=st.lists(st.floats(0.1, 5), max_size=4),
    servers=st.integers(1, 3),
    prefill=st.sampled_from([math.inf, 50.0]),
)
def test_every_dispatched_token_is_generated_once(lengths, pushes, servers, prefill):
    fleet = Fleet(Generation(servers, EngineCurve(((1, 10.0), (4, 25.0)), 4), prefill_tokens_per_s=prefill), seed=0)
    for group, length in enumerate(lengths):
        fleet.start(group, [length])
    whole: list[tuple[int, dict[int, int]]] = []
    for version, wait_s in enumerate(pushes, start=1):
        until = fleet.now + wait_s
        while fleet.now < until:
            whole += fleet.run(until)
        fleet.new_weights(version, 0)
    while ended := fleet.run(math.inf):
        whole += ended
    assert [(group, sum(tokens.values())) for group, tokens in sorted(whole)] == list(enumerate(lengths))


def test_a_lost_server_gives_its_requests_to_the_others():
    fleet = Fleet(Generation(2, EngineCurve(((1, 10.0), (4, 40.0)), 4)), seed=0)
    fleet.start(0, [100])
    fleet.start(1, [100])
    fleet.run(5.0)
    fleet.fail(0)
    ended = fleet.run(math.inf)
    assert fleet.now == pytest.approx(10.0)
    ended += fleet.run(math.inf)
    assert fleet.now == pytest.approx(15.0)
    assert sorted(group for group, _ in ended) == [0, 1]


def test_quantiles_come_out_again():
    drawn = np.array(QuantileLengths({0.5: 100, 0.9: 400}, 1600).draw(np.random.default_rng(1), 5000, 4, 0)).ravel()
    assert np.quantile(drawn, [0.5, 0.9]) == pytest.approx([100, 400], rel=0.05)
    assert drawn.min() >= 1
    assert drawn.max() <= 1600


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QuantileLengths({0.5: 5000}, 4096), "--max-length 4096"),
        (lambda: QuantileLengths({0.5: 500, 0.9: 100}, 4096), "must not have a shorter"),
        (lambda: QuantileLengths({1.5: 500}, 4096), "a share from 0 to 1"),
        (lambda: QuantileLengths({}, 4096), "give --lengths"),
        (lambda: MeasuredLengths([]), "give --lengths"),
        (lambda: EngineCurve((), 8), "give --tokens-per-s"),
        (lambda: EngineCurve(((8, -1.0),), 8), "a positive speed"),
        (lambda: EngineCurve(((8, 1.0), (8, 2.0)), 8), "given twice"),
        (lambda: Setting("async"), "there is no such mode"),
        (lambda: Setting("sync", 1), "it cannot be"),
        (lambda: workload(servers=0), "servers is 0"),
        (lambda: workload(step_s=-1.0), "must be 0 or more"),
        (lambda: simulate(Setting("sync"), workload(), steps=0), "--simulate-steps 0"),
    ],
)
def test_bad_numbers_are_refused(make, says):
    with pytest.raises(PlanError, match=says):
        make()
