"""The laws of a simulated run."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import verl_m2po
from verl_m2po.planner.fleet import Fleet
from verl_m2po.planner.setting import FRESH_SHARES, MODES, OFF, REPLAYING, Setting
from verl_m2po.planner.simulate import run_s, simulate
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
    saturates_at: int | None = None,
    **more,
) -> Workload:
    # Every request has the same speed, however many there are: a server of so many slots. Or more share the speed of
    # `saturates_at`.
    most = max_requests if saturates_at is None else saturates_at
    points = dict.fromkeys((1, most)) | {256: None} if saturates_at is not None else dict.fromkeys((1, most))
    slots = max_requests if saturates_at is None else 256
    curve = EngineCurve(tuple((n, tokens_per_s * min(n, most)) for n in points), slots)
    lengths = lengths or MeasuredLengths([[200] * 4])
    return Workload(8, 4, lengths, Generation(servers, curve), Training(step_s, push_s=push_s), **more)


TAIL = QuantileLengths({0.5: 100, 0.9: 400}, 1600)
STALENESS = st.integers(0, 4)
SETTINGS = st.one_of(
    st.builds(
        Setting, mode=st.sampled_from(["stale_k", "stale_k_separate", "bounded_async"]), staleness_steps=STALENESS
    ),
    # Of 8 prompts; `remix` too, which is no power of two.
    st.builds(
        Setting,
        mode=st.sampled_from(REPLAYING),
        staleness_steps=STALENESS,
        replay=st.sampled_from([name for name in FRESH_SHARES if name != OFF]),
    ),
)


@pytest.mark.parametrize("mode", MODES)
def test_an_unlimited_generator_gives_the_training_time(mode):
    outcome = simulate(of_mode(mode), workload(tokens_per_s=FAST, push_s=1.5), steps=5)
    assert outcome.mean_step_s == pytest.approx(10 + 1.5, rel=1e-4)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "replay"])
def test_an_unlimited_trainer_gives_the_generation_time(mode):
    outcome = simulate(of_mode(mode), workload(step_s=0.0, max_requests=8), steps=5)
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


@pytest.mark.parametrize("replay", ["x2", "x4", "x8", "remix"])
def test_with_replay_an_unlimited_trainer_gives_the_generation_time_of_what_is_new(replay):
    # Eight slots: a batch of 32 responses takes four waves of 2 s.
    slow = workload(step_s=0.0, servers=4, max_requests=2)
    assert simulate(Setting("sync"), slow, steps=5).mean_step_s == pytest.approx(8.0)
    outcome = simulate(Setting("replay", 30, replay=replay), slow, steps=8)
    assert outcome.mean_step_s == pytest.approx(2.0 * math.ceil(FRESH_SHARES[replay] * 8 * 4 / 8), rel=1e-3)
    assert outcome.replayed_share == pytest.approx(1 - FRESH_SHARES[replay])


@settings(max_examples=20, deadline=None)
@given(
    staleness=st.integers(1, 5),
    replay=st.sampled_from(["x2", "x4"]),
    step_s=st.floats(0.1, 10),
    slots=st.integers(2, 16),
    seed=st.integers(0, 5),
)
def test_replay_never_makes_the_trainer_of_bounded_async_wait_longer(staleness, replay, step_s, slots, seed):
    run = workload(step_s=step_s, lengths=TAIL, saturates_at=slots)
    once, again = (
        simulate(Setting("bounded_async", staleness, replay=option), run, steps=6, seed=seed)
        for option in (OFF, replay)
    )
    assert again.ramp_s + sum(again.step_s) <= once.ramp_s + sum(once.step_s) + 1e-6
    assert again.replayed_share <= 1 - FRESH_SHARES[replay]
    assert once.replayed_groups == once.replayed_tokens == 0


def test_where_generation_is_late_the_trainer_waits_less_with_replay():
    slow = workload(step_s=0.5, servers=4, saturates_at=2, lengths=TAIL)
    once = simulate(Setting("bounded_async", 8), slow, steps=40)
    again = simulate(Setting("bounded_async", 8, replay="x4"), slow, steps=40)
    assert again.mean_step_s < 0.6 * once.mean_step_s
    assert 0.4 < again.replayed_share <= 0.75
    assert again.mean_age > once.mean_age


def test_the_options_of_replay_are_those_of_the_hydra_group():
    folder = Path(verl_m2po.__file__).parent / "config" / "replay"
    read = {path.stem: yaml.safe_load(path.read_text())["trainer"]["v1"]["replay"] for path in folder.glob("*.yaml")}
    # `remix_whole` is `remix` as far as rollouts are concerned; a choice by reward cannot be simulated.
    known = {name: told["replay"] for name, told in read.items() if "replay" in told}
    assert {name for name, told in known.items() if told["sampling"] == "uniform"} == set(FRESH_SHARES)
    for name, share in FRESH_SHARES.items():
        told = Setting("bounded_async", 1, replay=name).replay_config
        assert (told.max_uses, told.fresh_share) == (known[name]["max_uses"], share)
        assert (told.fresh_share, told.sampling) == (known[name]["fresh_share"], known[name]["sampling"])


def test_bounded_async_waits_for_no_single_response():
    lengths = QuantileLengths({0.5: 100, 0.9: 300, 0.99: 1500}, 1600)
    tail = workload(step_s=1.0, lengths=lengths, saturates_at=4)
    exact = simulate(Setting("stale_k_separate", 2), tail, steps=20)
    bounded = simulate(Setting("bounded_async", 2), tail, steps=20)
    assert bounded.mean_step_s < 0.8 * exact.mean_step_s


@settings(max_examples=25, deadline=None)
@given(setting=SETTINGS, step_s=st.floats(0, 20), seed=st.integers(0, 5))
def test_ages_are_within_the_rules_bound(setting, step_s, seed):
    outcome = simulate(setting, workload(step_s=step_s, lengths=TAIL, push_s=0.2), steps=4, seed=seed)
    assert outcome.largest_age <= setting.staleness_steps
    if setting.mode not in REPLAYING:
        assert set(outcome.age_tokens) == {setting.staleness_steps}
        assert outcome.masked_tokens == outcome.dropped_tokens == 0


@settings(max_examples=15, deadline=None)
@given(setting=SETTINGS, seed=st.integers(0, 5), share=st.sampled_from([0.0, 0.2]))
def test_every_step_trains_a_batch_and_the_queue_is_as_deep_as_the_rule_allows(setting, seed, share):
    failing = workload(lengths=TAIL, failures=Failures(group_share=share))
    outcome = simulate(setting, failing, steps=4, seed=seed)
    assert outcome.trained_groups == 4 * 8
    assert outcome.deepest <= (setting.staleness_steps + 1) * 8
    assert (outcome.dropped_tokens > 0) == (share > 0) or setting.mode in REPLAYING


@settings(max_examples=10, deadline=None)
@given(setting=SETTINGS, seed=st.integers(0, 100))
def test_the_same_seed_gives_the_same_numbers(setting, seed):
    breaking = Failures(server_per_s=1e-3, trainer_per_s=1e-3, heals=True, replace_s=50)
    runs = [simulate(setting, workload(lengths=TAIL, failures=breaking), steps=4, seed=seed) for _ in range(2)]
    assert runs[0] == runs[1]


def of_mode(mode: str, staleness_steps: int = 2) -> Setting:
    """A mode that trains again only does so."""
    return Setting(mode, 0 if mode == "sync" else staleness_steps, replay="x2" if mode == "replay" else OFF)


@pytest.mark.parametrize("lengths", [None, TAIL])
@pytest.mark.parametrize(("mode", "staleness"), [(mode, steps) for mode in MODES for steps in (2, 8, 64)])
def test_the_time_of_a_run_is_that_of_all_its_steps(mode, staleness, lengths):
    setting = of_mode(mode, staleness)
    run = workload(step_s=5.0, push_s=0.5, saturates_at=8, lengths=lengths)
    steady = simulate(setting, run, steps=200).mean_step_s
    # Where beginning and end meet, all of the run is simulated.
    edges = 2 * setting.staleness_steps + 2
    for steps, tolerance in ((1, 1e-9), (edges, 1e-9), (edges + 100, 0.05)):
        whole = sum(simulate(setting, run, steps, warm_up=0, run_steps=steps).step_s)
        assert run_s(setting, run, steps, steady) == pytest.approx(whole, rel=tolerance)


def test_a_lost_server_costs_its_share_of_the_time_until_it_is_replaced():
    slow = workload(step_s=0.0, servers=2, max_requests=16, lengths=MeasuredLengths([[100] * 4]))
    breaking = Failures(server_per_s=5e-3, heals=True, replace_s=100.0)
    whole = simulate(of_mode("bounded_async"), slow, steps=600)
    broken = simulate(of_mode("bounded_async"), dataclasses.replace(slow, failures=breaking), steps=600)
    assert broken.server_failures > 2
    assert broken.restarts == 0
    # Half of the speed is gone for 100 s after each; what was lost with the server is a second's work at most.
    lost_s = sum(broken.step_s) - sum(whole.step_s) - broken.server_failures * 100 / 2
    assert 0 <= lost_s <= broken.server_failures


@pytest.mark.parametrize("heals", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_failures_cost_time_and_break_no_promise(mode, heals):
    breaking = Failures(server_per_s=1e-2, heals=heals, replace_s=60, restart_s=100, checkpoint_steps=4)
    setting = of_mode(mode)
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


def test_where_the_queue_delays_a_push_all_that_was_sent_has_begun():
    # 8 slots, 2 s a response: three batches of 32 are in flight, and a batch is trained in no time.
    run = workload(step_s=0.0, servers=4, max_requests=2)
    run = dataclasses.replace(run, generation=dataclasses.replace(run.generation, queue_delays_push=True))
    outcome = simulate(Setting("bounded_async", 2), run, steps=10)
    assert outcome.mean_step_s == pytest.approx(8.0)
    # Whatever was admitted has begun with the weights of its time: nothing is younger than the bound.
    assert outcome.mean_age > 1.5
    fleet = Fleet(Generation(1, EngineCurve(((1, 10.0), (2, 20.0)), 2)), seed=0)
    assert fleet.all_begun_at == -math.inf
    fleet.start(0, [30])
    fleet.start(1, [50])
    assert fleet.all_begun_at == -math.inf
    fleet.start(2, [10])
    fleet.start(3, [20])
    # The third begins at 3 s, where the first ends, and ends at 4 s; the fourth begins then.
    assert fleet.all_begun_at == pytest.approx(4.0)


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
        (lambda: Setting("bounded_async", 1, replay="x3"), "--replay x3: there is no such option"),
        (lambda: Setting("stale_k", 1, replay="x2"), "stale_k trains each rollout once"),
        (lambda: Setting("bounded_async", 1, replay="x8").rule(4, 0), "no whole number of the 4 prompts"),
        (lambda: workload(servers=0), "servers is 0"),
        (lambda: workload(step_s=-1.0), "must be 0 or more"),
        (lambda: simulate(Setting("sync"), workload(), steps=0), "--simulate-steps 0"),
    ],
)
def test_bad_numbers_are_refused(make, says):
    with pytest.raises(PlanError, match=says):
        make()
