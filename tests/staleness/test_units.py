"""The conversions between optimizer updates, trainer steps and weight versions."""

import json
import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tensordict import TensorDict
from verl.utils.tensordict_utils import make_iterator

from verl_m2po.staleness.rule.units import (
    StalenessUnitsError,
    UpdateClock,
    UpdateCount,
    exact_version,
    version_after_step,
    version_at_step,
)

small = st.integers(1, 64)


@st.composite
def clocks(draw):
    mini_batch = draw(small)
    return UpdateClock(mini_batch * draw(small), mini_batch, draw(st.integers(1, 4)))


@given(clocks(), st.integers(0, 1000))
def test_steps_and_updates_are_inverse(clock, steps):
    assert clock.steps(clock.updates(steps)) == steps


@given(clocks(), st.integers(0, 10_000))
def test_a_fraction_of_a_step_is_refused_with_the_two_nearest(clock, staleness_updates):
    assume(staleness_updates % clock.updates_per_step)
    below = staleness_updates // clock.updates_per_step * clock.updates_per_step
    with pytest.raises(StalenessUnitsError, match=rf"Set it to {below} or {below + clock.updates_per_step}"):
        clock.steps(staleness_updates)
    assert clock.steps(below) + 1 == clock.steps(below + clock.updates_per_step)


@given(small, small, st.integers(1, 4))
def test_updates_are_what_verl_makes(mini_batch, mini_batches, epochs):
    """Counted as the worker does: every epoch walks over the batch in mini-batches."""
    batch = mini_batch * mini_batches
    made = sum(1 for _ in range(epochs) for _ in range(0, batch, mini_batch))
    assert UpdateClock(batch, mini_batch, epochs).updates_per_step == made


@given(clocks(), st.integers(0, 100), st.integers(1, 300))
def test_the_age_of_an_exact_batch_grows_to_the_configured_one_and_stays(clock, k_steps, step):
    """Lag 0, 1, .., k, k, k, ..: the first k steps train on rollouts of the base model."""
    age = clock.age_updates(exact_version(step - 1, k_steps), version_at_step(step))
    assert age == clock.updates(min(step - 1, k_steps))


@given(st.integers(1, 300))
def test_a_step_pushes_the_version_that_the_next_one_starts_from(step):
    assert version_after_step(step) == version_at_step(step + 1)


def test_the_papers_setting():
    """256 prompts, mini-batches of 64: 4 updates a step; stale-256 is 64 steps, trained at 256 .. 259 updates."""
    clock = UpdateClock(256, 64)
    assert (clock.updates_per_step, clock.steps(256)) == (4, 64)
    assert sum(exact_version(batch, 64) == 0 for batch in range(200)) == 65


@pytest.mark.parametrize("wrong", [-1, 1.0, 0.5, True, "8", None])
def test_staleness_that_is_not_a_count_is_refused_by_name(wrong):
    with pytest.raises(StalenessUnitsError, match=r"trainer\.v1\.stale_k.staleness_updates is"):
        UpdateClock(8, 2).steps(wrong, "trainer.v1.stale_k.staleness_updates")


@pytest.mark.parametrize(
    ("sizes", "key"),
    [((0, 1), "train_batch_size"), ((8, 0), "ppo_mini_batch_size"), ((8, 2, 0), "ppo_epochs"), ((8, 3), "multiple")],
)
def test_impossible_batch_sizes_are_refused_by_name(sizes, key):
    with pytest.raises(StalenessUnitsError, match=key):
        UpdateClock(*sizes)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4))
def test_updates_of_rows_are_the_mini_batches_that_verls_worker_iterates_over(mini, mini_batches, n, epochs, per_loop):
    """`per_loop` trajectories for each response; verl pads the rows to a whole number of mini-batches."""
    clock = UpdateClock(mini * mini_batches, mini, epochs)
    rows = math.ceil(clock.train_batch_size * n * per_loop / (mini * n)) * mini * n
    batches = make_iterator(TensorDict({"a": torch.arange(rows)}, batch_size=[rows]), mini * n, epochs)
    assert clock.updates_of_rows(rows, n) == len(list(batches))
    assert per_loop > 1 or clock.updates_of_rows(rows, n) == clock.updates_per_step


@given(clocks(), st.integers(0, 20), st.integers(0, 20))
def test_where_nothing_is_counted_the_clock_says_how_old_data_is(clock, version, steps):
    assert UpdateCount(clock).between(version, version + steps) == clock.age_updates(version, version + steps)


@given(clocks(), st.lists(st.integers(0, 30), max_size=12), st.data())
def test_ages_add_up_what_the_steps_really_made(clock, made, data):
    """In whichever order the steps are counted; steps after the counted ones make what the configuration says."""
    count = UpdateCount(clock)
    for step in data.draw(st.permutations(range(1, len(made) + 1))):
        for _ in range(made[step - 1]):
            count.add(step, 1)
        count.add(step, 0)
    again = UpdateCount(clock)
    again.load_state_dict(json.loads(json.dumps(count.state_dict())))
    all_made = [*made, *[clock.updates_per_step] * 3]
    version = data.draw(st.integers(0, len(all_made)))
    at_version = data.draw(st.integers(0, len(all_made)))
    assert count.between(version, at_version) == again.between(version, at_version) == sum(all_made[version:at_version])
    bound, oldest_version = data.draw(st.integers(0, 60)), data.draw(st.integers(0, len(all_made)))
    within = [v for v in range(oldest_version, at_version) if sum(all_made[v:at_version]) <= bound]
    assert count.oldest_within(bound, at_version, oldest_version) == min([*within, at_version])


def test_an_age_takes_no_longer_the_older_the_data():
    """A walk over the steps would not end here."""
    clock, steps = UpdateClock(8, 4), 10**15
    count = UpdateCount(clock)
    count.add(steps, clock.updates_per_step + 1)
    assert count.between(0, steps) == clock.updates(steps) + 1
    assert count.oldest_within(5, steps, 0) == steps - 2


def test_a_loop_that_returns_its_trajectory_twice():
    """Batch 8, mini-batch 4, 4 responses: 64 rows, so 4 updates a step, not 2; one step behind is 4 updates old."""
    clock = UpdateClock(8, 4)
    count = UpdateCount(clock)
    for step in (1, 2, 3):
        count.add(step, clock.updates_of_rows(64, responses=4))
    assert count.in_step(2) == 4 and count.between(1, 2) == 4 != clock.updates_per_step
    assert count.oldest_within(2, at_version=3, oldest_version=2) == 3, "within 2 updates is only what is on-policy"
    assert count.oldest_within(4, at_version=3, oldest_version=1) == 2
