"""What a trainer step costs with each method of the study's comparison."""

import pytest

from staleness_study import comparison_plan, step_times
from staleness_study.step_times import StepTimes

TIMES = StepTimes({"grpo": 0.1, "vcpo": 0.15}, steps=3, machine="a machine", day="2026-01-01")


class Clock:
    """Moves only when a step works."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_steps_of_all_methods_take_turns_and_the_first_do_not_count():
    clock, seen = Clock(), []

    def step(name: str, cost: float):
        def work(number: int) -> None:
            seen.append((number, name))
            clock.now += 100 if number <= step_times.WARM_UP else cost * (number - step_times.WARM_UP)

        return work

    medians = step_times.in_turns({"a": step("a", 1.0), "b": step("b", 2.0)}, 3, clock)
    assert medians == pytest.approx({"a": 2.0, "b": 4.0})
    assert seen == [(number, name) for number in range(1, step_times.WARM_UP + 4) for name in ("a", "b")]


def test_what_is_written_is_read_and_a_missing_file_is_none(tmp_path):
    TIMES.write(tmp_path / "times.json")
    assert StepTimes.load(tmp_path / "times.json") == TIMES
    assert StepTimes.load(tmp_path / "other.json") is None


def test_times_are_multiples_of_grpos_which_is_in_the_comparison():
    assert TIMES.against_base("vcpo") == pytest.approx(1.5)
    assert TIMES.against_base("topr") is None
    assert step_times.BASE in comparison_plan.ALTERNATIVES
    assert "GRPO's 0.100 s" in TIMES.provenance


def test_a_real_measurement_has_every_method_it_is_asked_for():
    times = step_times.measure(("grpo", "decoupled_ppo"), 1)
    assert set(times.seconds) == {"grpo", "decoupled_ppo"}
    assert min(times.seconds.values()) > 0
