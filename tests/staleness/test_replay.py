"""Replay, driven by random traces: how often, how old and in which company a group is trained."""

import json
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Trace, Workload, outcome

from verl_m2po.staleness.rule.exact import ExactStale
from verl_m2po.staleness.rule.imitation import Imitation, Recalibration
from verl_m2po.staleness.rule.records import Row
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import SAMPLING, Reuse
from verl_m2po.staleness.rule.reusing import spread
from verl_m2po.staleness.rule.rules import StalenessViolation
from verl_m2po.staleness.rule.units import UpdateClock, UpdateCount
from verl_m2po.staleness.rule.worth import BATCHES_TO_A_SUCCESS, Judge, NothingSucceeds, Outcome

pytestmark = pytest.mark.slow

BATCH = 8


def workload(fail_share: float = 0.0) -> Workload:
    return Workload(length=lambda rng: rng.uniform(5, 50), fail_share=fail_share, rows=1, overlaps=False)


def run(rule: Replay, steps: int, seed: int = 0, fail_share: float = 0.0) -> Trace:
    return Simulation(rule, workload(fail_share), seed).run(steps)


def batches(trace: Trace) -> dict[int, list[str]]:
    """{weight version: uids} of all batches, in their order."""
    found = defaultdict(list)
    for version, _, group in trace.trained:
        found[version].append(group.ticket.uid)
    return found


def is_worth(sampling: str, uid: str) -> bool:
    """Whether `sampling` trains a group again."""
    seen = outcome(uid)
    return {"informative": seen.has_advantage, "positive": seen.has_success}.get(sampling, True)


def check(bound: int, reuse: Reuse, steps: int, seed: int, fail_share: float, batch: int = BATCH) -> None:
    rule = Replay(bound, batch, reuse)
    simulation = Simulation(rule, workload(fail_share), seed)
    trace = simulation.run(steps)
    assert len(trace.trained) == steps * batch
    assert all(version - bound <= group.min_version <= version for version, _, group in trace.trained)
    uses, first_uses = Counter(), 0
    for uids in batches(trace).values():
        assert len(set(uids)) == batch, "a group is twice in a batch"
        new = sum(uid not in uses for uid in uids)
        assert new >= reuse.first_uses
        assert all(is_worth(reuse.sampling, uid) for uid in uids if uid in uses)
        first_uses += new
        uses.update(uids)
    assert reuse.max_uses is None or max(uses.values()) <= reuse.max_uses
    # Nothing starves: what was generated has been trained, or is counted under the reason why not.
    assert simulation.dispatched == first_uses + trace.ended.total()
    assert rule.depth == 0
    assert len(rule.stored_groups()) <= (bound + 1) * batch


cases = given(
    bound=st.integers(0, 9),
    max_uses=st.none() | st.integers(1, 9),
    first_uses=st.integers(1, BATCH),
    sampling=st.sampled_from(SAMPLING),
    seed=st.integers(0, 2**32),
    fail_share=st.sampled_from([0.0, 0.3]),
)


@settings(max_examples=60, deadline=None)
@cases
def test_uses_ages_and_shares_are_as_asked_whatever_happens(bound, max_uses, first_uses, sampling, seed, fail_share):
    check(bound, Reuse(max_uses, first_uses, sampling, seed), 40, seed, fail_share)


@pytest.mark.parametrize(("sampling", "max_uses", "steps"), [("uniform", 4, 100_000), ("positive", None, 4_000)])
def test_for_a_long_time(sampling, max_uses, steps):
    check(16, Reuse(max_uses, 1, sampling), steps, seed=1, fail_share=0.05, batch=2)


def test_one_use_trains_every_group_once_with_the_weights_that_generated_it():
    trace = run(Replay(0, BATCH, Reuse(1, BATCH)), 20)
    assert [group.ticket.place for _, _, group in trace.trained] == list(range(20 * BATCH))
    assert all(group.min_version == version for version, _, group in trace.trained)


def test_four_uses_and_a_quarter_of_new_groups_generate_a_quarter():
    """After the first batch, which is all new."""
    rule = Replay(64, 32, Reuse(4, 8))
    trace = run(rule, 300)
    assert len({group.ticket.uid for _, _, group in trace.trained}) == 32 + 299 * 8


def ages_and_uses(max_uses: int | None) -> tuple[float, float]:
    """Mean age in steps, and mean uses, of what is trained with a quarter new and a window of 64 steps."""
    trace = run(Replay(64, 32, Reuse(max_uses, 8)), 400)
    trained = [(version - group.min_version, group.ticket.uid) for version, _, group in trace.trained]
    late = trained[32 * 200 :]
    return sum(age for age, _ in late) / len(late), len(late) / len({uid for _, uid in late})


def test_the_share_of_new_groups_sets_the_mean_uses_and_a_tight_limit_empties_the_window():
    free_age, free_uses = ages_and_uses(None)
    tight_age, tight_uses = ages_and_uses(4)
    assert free_uses == pytest.approx(3, abs=1) and tight_uses == pytest.approx(4, rel=0.05)
    assert free_age > 20 and tight_age < 4


def test_uniform_draws_each_of_the_groups_equally_often():
    """8 of 32 are drawn: over 400 seeds each 100 times, with a standard deviation of 8.7."""
    drawn = Counter()
    for seed in range(400):
        rule = Replay(9, 32, Reuse(9, 16, "uniform", seed))
        run(rule, 1)
        drawn.update(group.ticket.uid for group in rule.pool.draw(8, 1)[0])
    assert len(drawn) == 32
    assert all(60 < count < 140 for count in drawn.values())


def test_newest_draws_what_was_generated_last():
    rule = Replay(9, 4, Reuse(9, 2, "newest"))
    trace = run(rule, 3)
    new, old = {"g6", "g7"}, {"g4", "g5"}
    assert set(batches(trace)[2]) == new | old


def test_what_became_too_old_is_handed_over_for_deletion_once():
    rule, retired = Replay(1, 2, Reuse(9, 2)), []
    for version in range(6):
        for uid in (f"a{version}", f"b{version}"):
            rule.admit(uid, version)
            rule.finish(uid, (Row(f"{uid}_0_0", 1, 3, ((version, 3),)),))
        selection = rule.select(version, 2)
        assert selection.used_up == ()
        retired += [group.ticket.uid for group in selection.retired]
    assert retired == ["a0", "b0", "a1", "b1", "a2", "b2", "a3", "b3"]


def test_a_group_of_other_weights_is_refused():
    rule = Replay(4, 1, Reuse(2, 1))
    rule.admit("a", 0)
    with pytest.raises(StalenessViolation, match="dispatched with weight version 0 and generated by versions 1 to 1"):
        rule.finish("a", (Row("a_0_0", 1, 3, ((1, 3),)),))


def test_a_batch_that_nobody_judged_is_an_error_where_the_choice_depends_on_it():
    rule = Replay(9, 1, Reuse(2, 1, "informative"))
    rule.admit("a", 0)
    rule.finish("a", (Row("a_0_0", 1, 3, ((0, 3),)),))
    rule.select(0, 1)
    with pytest.raises(ValueError, match="sampling=informative: the last batch was trained and not judged"):
        rule.admissible(1)


def test_imitation_of_a_task_whose_rewards_are_never_positive_ends_with_what_to_do():
    judge, nothing = Judge("positive"), {"a": Outcome(-1.0, True, False, has_score=False)}
    for _ in range(BATCHES_TO_A_SUCCESS - 1):
        judge.see(nothing)
    resumed = Judge("positive")
    resumed.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    with pytest.raises(NothingSucceeds, match=r"none of the first 10 batches.*set replay.sampling=informative"):
        resumed.see(nothing)
    judge.see({"a": Outcome(1.0, False, False, has_score=True)})
    for _ in range(BATCHES_TO_A_SUCCESS):
        judge.see(nothing)


def test_the_weight_of_imitation_rises_as_in_spear():
    weights = [Imitation(ramp_steps=200).weight(step) for step in (0, 50, 100, 150, 200, 900)]
    assert weights == pytest.approx([0, 0.1464, 0.5, 0.8536, 1, 1], abs=1e-4)
    assert Imitation().weight(1) == 1


def test_the_baseline_is_the_median_of_the_groups_that_were_new_last():
    recalibration = Recalibration(Imitation(baseline_groups=3))
    assert recalibration.baseline() is None
    recalibration.add([9.0, 0.0, 0.25, 1.0])
    assert recalibration.baseline() == 0.25
    off = Recalibration(Imitation())
    off.add([1.0])
    assert off.baseline() is None


@pytest.mark.parametrize("wrong", [(0, 1, "uniform"), (1, 0, "uniform"), (1, 1, "best")])
def test_a_reuse_that_nothing_can_honour_is_refused(wrong):
    with pytest.raises(ValueError, match=r"at least 1|none of uniform, newest"):
        Reuse(*wrong)


def test_a_checkpoint_is_resumed_with_the_reuse_it_was_written_with():
    state = Replay(4, 8, Reuse(4, 2)).state_dict()
    with pytest.raises(ValueError, match=r"'max_uses': 4.*this run reuses rollouts as .*'max_uses': 2"):
        Replay(4, 8, Reuse(2, 2)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"rule='replay', this run has rule='exact_stale'"):
        ExactStale(4, 8).load_state_dict(state)


def test_steps_of_more_updates_than_configured_shorten_the_window():
    updates = UpdateCount(UpdateClock(2, 1))
    rule = Replay(4, 2, Reuse(9, 1), updates)
    for version in range(8):
        for uid in [f"{version}-{i}" for i in range(rule.admissible(version))]:
            rule.admit(uid, version)
            rule.finish(uid, (Row(f"{uid}_0_0", 1, 3, ((version, 3),)),))
        selection = rule.select(version, 2)
        ages = [updates.between(group.min_version, version) for group in selection.groups]
        assert max(ages) <= 8
        updates.add(version + 1, 6)
    assert len(rule.stored_groups()) <= 2 * 2


def test_new_groups_are_spread_over_the_mini_batches():
    assert "".join(spread(list("ab"), list("uvwxyz"))) == "uvwaxyzb"
    assert spread([], []) == ()
