"""Bounded staleness with replay, driven by random traces: nobody waits that need not, and every bound holds."""

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Trace, Workload, outcome

from verl_m2po.staleness.build_rule import build_rule
from verl_m2po.staleness.config import BoundedAsyncConfig, ReplayConfig
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.bounded_replay import BoundedReplay
from verl_m2po.staleness.rule.reuse import SAMPLING, Reuse
from verl_m2po.staleness.rule.rules import StalenessRule
from verl_m2po.staleness.rule.units import UpdateClock

pytestmark = pytest.mark.slow

BATCH = 8
SLOW, FAST = 40.0, 4000.0
"""Tokens in the time of a trainer step, of each of the groups that are generated side by side."""


def workload(speed: float, fail_share: float = 0.0) -> Workload:
    return Workload(lambda rng: min(400, rng.paretovariate(1.0) * 10), speed, fail_share, rows=2)


def check(trace: Trace, rule: BoundedReplay, steps: int, parts: int) -> None:
    reuse, bound = rule.pool.reuse, rule.staleness_steps
    batches, uses = defaultdict(list), Counter()
    for version, oldest, group in trace.trained:
        batches[version].append(group.ticket.uid)
        kept = [v for row in group.rows for v, _ in row.spans if oldest is None or v >= oldest]
        assert version - bound <= min(kept) and max(kept) <= version
    assert sorted(batches) == list(range(steps))
    for version, uids in sorted(batches.items()):
        assert len(uids) == len(set(uids)) == BATCH, f"a group is twice in the batch of {version}"
        assert sum(uid not in uses for uid in uids) >= reuse.first_uses
        assert all(is_worth(reuse.sampling, uid) for uid in uids if uid in uses)
        uses.update(uids)
    assert reuse.max_uses is None or max(uses.values()) <= reuse.max_uses
    assert len(rule.stored_groups()) <= 2 * (bound + 1) * BATCH


def is_worth(sampling: str, uid: str) -> bool:
    seen = outcome(uid)
    return {"informative": seen.has_advantage, "positive": seen.has_success}.get(sampling, True)


@settings(max_examples=60, deadline=None)
@given(
    bound=st.integers(1, 9),
    max_uses=st.none() | st.integers(1, 9),
    first_uses=st.integers(1, BATCH),
    sampling=st.sampled_from(SAMPLING),
    parts=st.sampled_from([1, 2, 4]),
    speed=st.sampled_from([SLOW, 200.0, FAST]),
    fail_share=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_uses_ages_and_shares_are_as_asked(bound, max_uses, first_uses, sampling, parts, speed, fail_share, seed):
    rule = BoundedReplay(bound, BATCH, Reuse(max_uses, first_uses, sampling, seed))
    check(Simulation(rule, workload(speed, fail_share), seed, parts).run(30), rule, 30, parts)


def test_for_a_long_time():
    rule = BoundedReplay(16, BATCH, Reuse(6, 1))
    check(Simulation(rule, workload(SLOW, 0.05), 1).run(4000), rule, 4000, 1)


@settings(max_examples=30, deadline=None)
@given(bound=st.integers(0, 5), speed=st.sampled_from([SLOW, FAST]), seed=st.integers(0, 2**32))
def test_with_one_use_nothing_changes(bound, speed, seed):
    def trace(rule: StalenessRule) -> Trace:
        return Simulation(rule, workload(speed, 0.1), seed).run(25)

    once = BoundedReplay(bound, BATCH, Reuse(1, BATCH))
    assert trace(once) == trace(BoundedAsync(bound, BATCH))


def test_a_trainer_that_may_train_again_waits_for_its_first_batch_only():
    """A batch of eight takes at least ten steps of the trainer, and eight of its groups are begun at a time."""

    def waited(rule: StalenessRule) -> float:
        slow = Workload(lambda rng: rng.uniform(100, 300), 20.0, rows=1)
        return Simulation(rule, slow, 3).run(60).waited

    first_batch = 15.0
    assert waited(BoundedReplay(63, BATCH, Reuse(None, 1))) < 2 * first_batch
    assert waited(BoundedAsync(1, BATCH)) > 5 * first_batch


@settings(max_examples=30, deadline=None)
@given(
    bound=st.integers(0, 9),
    ahead=st.integers(0, 9),
    speed=st.sampled_from([SLOW, FAST, 1e9]),
    seed=st.integers(0, 2**32),
)
def test_generation_runs_ahead_as_far_as_asked_however_wide_the_window(bound, ahead, speed, seed):
    ahead = min(ahead, bound)
    rule = BoundedReplay(bound, BATCH, Reuse(None, 1, seed=seed), ahead_steps=ahead)
    begun, admissible = [], rule.admissible
    rule.admissible = lambda version: begun.append(admissible(version) + rule.depth) or admissible(version)
    trace = Simulation(rule, workload(speed), seed).run(30)
    assert max(begun) == (ahead + 1) * BATCH
    first: dict[str, int] = {}
    for version, _, group in trace.trained:
        # The youngest token: what it waited after it was finished
        first.setdefault(group.ticket.uid, version - max(v for row in group.rows for v, _ in row.spans))
    assert speed < 1e9 or max(first.values()) <= ahead + 1


def test_a_wide_window_does_not_make_the_first_uses_old():
    """Generation as fast as training: with the window as the only limit it runs ahead by all of it."""

    def ages(ahead_steps: int | None) -> float:
        rule = BoundedReplay(32, BATCH, Reuse(None, 1), ahead_steps=ahead_steps)
        trace = Simulation(rule, workload(FAST), 1).run(200)
        return max(version - group.min_version for version, _, group in trace.trained)

    assert ages(1) <= 3
    assert ages(None) == 32


def test_generation_cannot_run_further_ahead_than_the_window():
    with pytest.raises(ValueError, match=r"ahead_steps is 5; it is at most staleness_steps, 4"):
        BoundedReplay(4, BATCH, Reuse(4, 2), ahead_steps=5)


def test_where_generation_keeps_up_every_rollout_is_trained_once():
    rule = BoundedReplay(4, BATCH, Reuse(None, 1))
    trace = Simulation(rule, workload(FAST), 1).run(40)
    assert len({group.ticket.uid for *_, group in trace.trained}) == 40 * BATCH


@pytest.mark.parametrize(("max_uses", "fresh_share", "expected"), [(1, 1.0, BoundedAsync), (2, 0.5, BoundedReplay)])
def test_one_use_is_the_rule_without_replay_and_costs_what_it_costs(max_uses, fresh_share, expected):
    clock = UpdateClock(train_batch_size=BATCH, ppo_mini_batch_size=BATCH)
    config = BoundedAsyncConfig(staleness_updates=4, replay=ReplayConfig(max_uses=max_uses, fresh_share=fresh_share))
    assert type(build_rule(config, clock, seed=1)) is expected


def test_a_checkpoint_with_replay_is_not_resumed_without_or_with_another():
    state = BoundedReplay(4, BATCH, Reuse(4, 2)).state_dict()
    with pytest.raises(ValueError, match=r"rule='bounded_replay', this run has rule='bounded_async'"):
        BoundedAsync(4, BATCH).load_state_dict(state)
    with pytest.raises(ValueError, match=r"'max_uses': 4.*this run reuses rollouts as .*'max_uses': 2"):
        BoundedReplay(4, BATCH, Reuse(2, 2)).load_state_dict(state)
