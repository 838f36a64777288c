"""A bound that moves while a run goes on: the promises of the fixed one, whichever way it moves."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rollout_simulation import Simulation, Workload

from verl_m2po.staleness import checks
from verl_m2po.staleness.account.bound import MASKED, MISMATCH_FLOOR, SECOND_MOMENT, NoSignal, move_bound
from verl_m2po.staleness.build_rule import build_rule
from verl_m2po.staleness.checks.adaptive import KEY
from verl_m2po.staleness.config import load_mode_config
from verl_m2po.staleness.rule.adaptive import AdaptiveBound
from verl_m2po.staleness.rule.adaptive_async import AdaptiveAsync
from verl_m2po.staleness.rule.bounded import BoundedAsync
from verl_m2po.staleness.rule.units import UpdateClock

CLOCK = UpdateClock(256, 64)
LOADED = {MASKED: 0.2, SECOND_MOMENT: 0.01}


class Moved(Simulation):
    """The bound jumps to anywhere within its limits while a step is trained, where the trainer would move it."""

    def __init__(self, least: int, **of_simulation):
        super().__init__(**of_simulation)
        self._least, self._draw = least, random.Random(of_simulation["seed"])
        self.bounds: dict[int, int] = {}

    def _train(self, step: int) -> None:
        self.bounds[step - 1] = self.rule.bound_steps
        super()._train(step)

    def _run_for(self, time: float) -> None:
        self.rule.bound_steps = self._draw.randint(self._least, self.rule.staleness_steps)
        super()._run_for(time)


@settings(max_examples=60, deadline=None)
@given(
    limits=st.tuples(st.integers(0, 3), st.integers(0, 6)).map(lambda each: (each[0], sum(each))),
    parts=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.25, 1.0]),
    workload=st.builds(
        Workload,
        length=st.sampled_from([lambda rng: rng.uniform(5, 50), lambda rng: rng.lognormvariate(3.0, 1.5)]),
        tokens_per_time=st.sampled_from([20.0, 100.0, 1000.0]),
        fail_share=st.sampled_from([0.0, 0.3]),
        train_time=st.sampled_from([0.0, 0.2, 1.0]),
    ),
    seed=st.integers(0, 2**32),
)
def test_every_batch_keeps_the_bound_that_it_was_selected_under(limits, parts, share, workload, seed):
    rule = BoundedAsync(limits[1], 4, share)
    simulation = Moved(limits[0], rule=rule, workload=workload, seed=seed, parts=parts)
    trace = simulation.run(30)
    assert len(trace.trained) == 30 * 4
    for version, oldest, group in trace.trained:
        spans = [span for row in group.rows for span in row.spans]
        kept = [v for v, tokens in spans if tokens and (oldest is None or v >= oldest)]
        assert kept and version - simulation.bounds[version] <= min(kept) <= max(kept) <= version
    assert trace.max_depth <= (limits[1] + 1) * 4
    assert simulation.dispatched == len(trace.trained) + trace.ended.total()


def adaptive(**changes):
    """What the checks read of a sound configuration, with changes of the moving bound."""
    settings = {"enable": True, "min_staleness_updates": 8, "max_staleness_updates": 64, **changes}
    mode = {"staleness_updates": 64, "adaptive": settings}
    rollout = {
        **{"n": 8, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "agent": {}},
        **{"nnodes": 1, "n_gpus_per_node": 4, "checkpoint_engine": {"backend": "nccl"}},
    }
    return OmegaConf.create(
        {
            "data": {"train_batch_size": 256, "max_prompt_length": 512, "max_response_length": 1024},
            "algorithm": {},
            "actor_rollout_ref": {
                **{"hybrid_engine": False, "actor": {"ppo_mini_batch_size": 64, "ppo_epochs": 1}, "rollout": rollout}
            },
            "trainer": {"v1": {"trainer_mode": "bounded_async", "bounded_async": mode, "sampler": {}}},
        }
    )


def rule_of(base) -> AdaptiveAsync:
    rule = build_rule(load_mode_config(base, "bounded_async"), CLOCK, seed=None)
    assert isinstance(rule, AdaptiveAsync)
    return rule


def test_what_a_step_logged_moves_the_bound_of_the_next_and_says_why():
    rule = rule_of(adaptive(patience_steps=1))
    assert (rule.bound_steps, rule.bound.least) == (16, 2)
    logged = move_bound(rule, CLOCK, LOADED, waiting_share=0.5)
    assert (logged["staleness/bound_updates"], rule.bound_steps) == (64, 8)
    assert (logged["staleness/bound_lowered_by_masking"], logged["staleness/bound_load"]) == (1, pytest.approx(20))
    # Of the second moment what the mismatch explains is no load.
    excused = {MASKED: 0.0, SECOND_MOMENT: 0.5, MISMATCH_FLOOR: 0.49}
    assert sum(move_bound(rule, CLOCK, excused, 0.0).values()) == pytest.approx(32 + 0.25)
    logged = move_bound(rule, CLOCK, excused | {MISMATCH_FLOOR: 0.1}, 0.0)
    assert (logged["staleness/bound_lowered_by_second_moment"], rule.bound_steps) == (1, 4)


def test_a_step_without_updates_moves_nothing_and_one_without_a_measurement_ends_the_run():
    rule = rule_of(adaptive())
    assert move_bound(rule, CLOCK, {"critic/score/mean": 1.0}, 1.0)["staleness/bound_updates"] == 64
    with pytest.raises(NoSignal, match="actor/m2po/second_moment_before"):
        move_bound(rule, CLOCK, {MASKED: 0.1, "actor/loss": 0.0}, 1.0)


def test_a_checkpoint_has_the_bound_whether_it_was_fixed_before_or_not():
    rule = rule_of(adaptive(patience_steps=1))
    move_bound(rule, CLOCK, LOADED, 0.5)
    state = json.loads(json.dumps(rule.state_dict()))
    resumed = rule_of(adaptive(patience_steps=1))
    resumed.load_state_dict(state)
    assert (resumed.bound_steps, resumed.bound.state_dict()) == (8, rule.bound.state_dict())
    fixed = BoundedAsync(16, 256)
    fixed.load_state_dict(state)
    assert fixed.bound_steps == 16
    resumed.load_state_dict(json.loads(json.dumps(BoundedAsync(16, 256).state_dict())))


def test_limits_that_a_run_can_honour_have_no_problem():
    assert checks.check(adaptive()) == []
    assert AdaptiveBound(2, 16).bound_steps == 16


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"min_staleness_updates": 128}, "min_staleness_updates", "Set it to 64 or less"),
        ({"min_staleness_updates": 10}, "min_staleness_updates", "Set it to 8 or 12"),
        ({"min_staleness_updates": -4}, "min_staleness_updates", "cannot be negative"),
        ({"max_staleness_updates": 62}, "max_staleness_updates", "Set it to 60 or 64"),
        ({"max_staleness_updates": None}, "max_staleness_updates", "such as to 64"),
        ({"target_masked_fraction": 0.0}, "target_masked_fraction", "share of the tokens"),
        ({"target_second_moment": -1.0}, "target_second_moment", "second moment"),
        ({"quiet_share": 1.0}, "quiet_share", "below 1"),
        ({"waiting_share": 2.0}, "waiting_share", "share of a trainer step"),
        ({"patience_steps": 0}, "patience_steps", "trainer steps"),
    ],
)
def test_limits_that_no_run_can_honour_are_refused_with_what_to_do(changes, key, says):
    (problem,) = checks.check(adaptive(**changes))
    assert problem.is_fatal and problem.key == f"{KEY}.{key}" and says in str(problem)


def test_a_bound_that_contradicts_the_largest_is_refused_and_one_that_cannot_move_is_mentioned():
    base = adaptive()
    base.trainer.v1.bounded_async.staleness_updates = 32
    (problem,) = checks.check(base)
    assert problem.is_fatal and problem.key.endswith("async.staleness_updates") and "Set it to 64" in str(problem)
    (problem,) = checks.check(adaptive(min_staleness_updates=64))
    assert not problem.is_fatal and "cannot move" in str(problem)


@pytest.mark.parametrize("mode", ["sync", "stale_k", "stale_k_separate", "replay"])
def test_a_moving_bound_in_a_mode_without_one_is_refused(mode):
    base = adaptive()
    base.trainer.v1.trainer_mode = mode
    OmegaConf.update(base, f"trainer.v1.{mode}", {"staleness_updates": 0}, force_add=True)
    problems = [problem for problem in checks.check(base) if problem.key == f"{KEY}.enable"]
    assert len(problems) == 1 and "trainer.v1.trainer_mode=bounded_async" in str(problems[0])
