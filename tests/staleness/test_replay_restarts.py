"""A run that trains rollouts again and is restarted trains what the uninterrupted run would have."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_simulation import Simulation, Trace, Workload

from verl_m2po.staleness.rule.bounded_replay import BoundedReplay
from verl_m2po.staleness.rule.imitation import Imitation
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import SAMPLING, Reuse
from verl_m2po.staleness.rule.reusing import Reusing

pytestmark = pytest.mark.slow

BATCH, STEPS = 8, 25

TURNS = Workload(lambda rng: rng.uniform(5, 50), fail_share=0.1, rows=1, overlaps=False)
SIDE_BY_SIDE = Workload(lambda rng: min(400, rng.paretovariate(1.0) * 10), 200.0, rows=2)


def trace(make: Callable[[], Reusing], work: Workload, seed: int, parts: int, stop: int | None) -> Trace:
    """A run that is saved and goes on from its state after step `stop`; None: that is not interrupted."""

    def begun() -> Reusing:
        rule = make()
        rule.limit(STEPS)
        return rule

    simulation = Simulation(begun(), work, seed, parts)
    for step in range(1, STEPS + 1):
        simulation._train(step)
        if step == stop:
            state = json.loads(json.dumps(simulation.rule.state_dict()))
            simulation.rule = begun()
            simulation.rule.load_state_dict(state)
            assert json.loads(json.dumps(simulation.rule.state_dict())) == state
    return simulation.trace


@pytest.mark.parametrize(("rule", "work"), [(Replay, TURNS), (BoundedReplay, SIDE_BY_SIDE)])
@settings(max_examples=30, deadline=None)
@given(
    bound=st.integers(1, 6),
    max_uses=st.none() | st.integers(2, 6),
    sampling=st.sampled_from(SAMPLING),
    stop=st.integers(1, STEPS - 1),
    parts=st.sampled_from([1, 2]),
)
def test_a_restart_draws_what_the_uninterrupted_run_would(rule, work, bound, max_uses, sampling, stop, parts):
    def make() -> Reusing:
        return rule(bound, BATCH, Reuse(max_uses, 2, sampling), imitation=Imitation(5, 9))

    parts = 1 if rule is Replay else parts
    assert trace(make, work, stop, parts, stop) == trace(make, work, stop, parts, None)


@pytest.mark.parametrize("rule", [Replay, BoundedReplay])
def test_another_seed_draws_others_from_then_on_as_it_does_of_the_data(rule):
    state = rule(2, BATCH, Reuse(4, 2, seed=1)).state_dict()
    rule(2, BATCH, Reuse(4, 2, seed=7)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"written with .*'max_uses': 4.* this run reuses rollouts as .*'max_uses': 3"):
        rule(2, BATCH, Reuse(3, 2, seed=1)).load_state_dict(state)
