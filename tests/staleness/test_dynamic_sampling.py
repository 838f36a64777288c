"""Groups without advantage: verl's own judgement of them, the error of a metric that is not there, and the limit."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import replay_buffer
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

from verl_m2po.staleness.dynamic_sampling import DynamicSampling
from verl_m2po.staleness.rollout.informative import UnknownMetric, shared_metric
from verl_m2po.staleness.rollout.masking import StoredRow
from verl_m2po.staleness.rule import events
from verl_m2po.staleness.rule.failures import FailureWindow
from verl_m2po.staleness.rule.informative import InformativeWindow, TooFewInformative
from verl_m2po.staleness.rule.records import Group, GroupReport, Row, Ticket


def stored(i: int, reward: float | None, **returned: object) -> StoredRow:
    rest = {"extra_fields": {"reward_extra_info": returned}}
    if reward is not None:
        rest["last_token_reward"] = reward
    return StoredRow(Row(f"u_{i}_0", 1, 1, ((0, 1),)), {"rest": rest})


def verls_judgement(groups: list[list[tuple[float, float]]], metric: str) -> set[int]:
    """Which of `groups`, each a list of (reward, acc), verl's buffer filters out."""
    rows = {f"{uid}_{i}_0": values for uid, group in enumerate(groups) for i, values in enumerate(group)}
    buffer = object.__new__(ReplayBufferAsync)
    buffer.filter_groups_metric = metric
    buffer.finished_keys = {"train": {str(uid) for uid in range(len(groups))}}
    buffer.partitions = {"train": {key: {} for key in rows}}
    buffer._dapo_classification_cache = defaultdict(dict)

    def get(keys, partition_id, select_fields):
        if select_fields == ["rm_scores"]:
            return {"rm_scores": [torch.tensor([0.0, rows[key][0]]) for key in keys]}
        return {"extra_fields": [{"reward_extra_info": {"acc": rows[key][1]}} for key in keys]}

    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(replay_buffer, "tq", SimpleNamespace(kv_batch_get=get))
        filtered, _ = buffer._dapo_filtered_keys("train")
    return set(map(int, filtered))


# Sums of quarters are exact, so that verl's standard deviation of equal values is 0.
values = st.sampled_from([0.0, 0.25, 1.0, -0.5])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.tuples(values, values), min_size=1, max_size=5), min_size=1, max_size=6),
    st.sampled_from(["reward", "acc"]),
)
def test_a_group_is_set_aside_exactly_where_verls_buffer_filters_it(groups, metric):
    rows = [[stored(i, reward, acc=acc) for i, (reward, acc) in enumerate(group)] for group in groups]
    ours = {uid for uid, group in enumerate(rows) if shared_metric(group, metric) is not None}
    assert ours == verls_judgement(groups, metric)


def test_equal_rewards_are_equal_whatever_their_mean_rounds_to():
    assert shared_metric([stored(i, 0.1) for i in range(3)], "reward") == 0.1


@pytest.mark.parametrize("returned", [{"score": 1.0}, {"acc": None}, {"acc": "good"}])
def test_a_metric_that_the_reward_does_not_return_is_one_clear_error(returned):
    with pytest.raises(UnknownMetric) as refused:
        shared_metric([stored(0, 1.0, **returned)], "acc")
    message = str(refused.value)
    assert message.startswith("algorithm.filter_groups.metric=acc: ") and "u_0_0" in message
    assert f"it returned {next(iter(returned))}" in message and "or to reward" in message


def set_aside(value: float = 0.0) -> events.SetAside:
    rows = (Row("u_0_0", 1, 1, ((0, 1),)), Row("u_1_0", 1, 1, ((0, 0),)))
    return events.SetAside(Ticket("u", 0, 0, 0), GroupReport("u", rows, masked_errors=("x",), shared_metric=value))


KEPT = events.Returned(Group(Ticket("u", 0, 0, 0), ()))
FAILED = events.Failed(Ticket("u", 0, 0, 0), GroupReport("u", (), error="x"))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([KEPT, FAILED, set_aside()]), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_the_run_ends_at_the_first_window_that_fills_no_batch(happened, most, batch, restart_at):
    ended = [event for event in happened if event is not FAILED]
    size = most * batch
    expected = next(
        (
            n
            for n in range(size, len(ended) + 1)
            if ended[n - size : n].count(KEPT) < batch and ended[n - 1] is not KEPT
        ),
        None,
    )
    window, seen, stopped_at = InformativeWindow("acc", most, batch), 0, None
    for i, event in enumerate(happened):
        if i == restart_at:
            state = json.loads(json.dumps(window.state_dict()))
            window = InformativeWindow("acc", most, batch)
            window.load_state_dict(state)
        seen += event is not FAILED
        try:
            window.on_event(event)
        except TooFewInformative:
            stopped_at = seen
            break
    assert stopped_at == expected


def test_the_end_says_what_the_groups_have_in_common():
    window = InformativeWindow("acc", 2, 2)
    for event in (KEPT, set_aside(1.0), set_aside(0.0)):
        window.on_event(event)
    with pytest.raises(TooFewInformative) as ended:
        window.on_event(set_aside(0.0))
    message = str(ended.value)
    assert "max_num_gen_batches=2: of the last 4 prompt groups only 1 have an advantage" in message
    assert "same acc: 2 groups with 0, 1 groups with 1" in message


def test_a_group_without_advantage_has_not_failed_but_its_masked_trajectories_have():
    window = FailureWindow(max_failed_fraction=0.0, window=2)
    window.on_event(KEPT_WHOLE)
    with pytest.raises(RuntimeError, match=r"0\.5 of the last 2"):
        window.on_event(set_aside())


KEPT_WHOLE = events.Returned(Group(Ticket("u", 0, 0, 0), (Row("u_0_0", 1, 1, ((0, 1),)),)))


def test_what_is_off_is_none_and_no_limit_is_none():
    config = OmegaConf.create({"algorithm": {"filter_groups": {"enable": False, "metric": "acc"}}})
    assert DynamicSampling.of(config) is None
    config.algorithm.filter_groups.enable = True
    assert DynamicSampling.of(config) == DynamicSampling("acc", None, 1)
    config.algorithm.filter_groups.update({"max_num_gen_batches": 3, "max_inflight_gen_batches": 2})
    assert DynamicSampling.of(config) == DynamicSampling("acc", 3, 2)
