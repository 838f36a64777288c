"""The conversions between optimizer updates, trainer steps and weight versions."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from verl_m2po.staleness.rule.units import (
    StalenessUnitsError,
    UpdateClock,
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
