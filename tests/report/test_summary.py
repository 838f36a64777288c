import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_logs import stale_run, write_log

from verl_m2po.report.build import build
from verl_m2po.report.reading.groups import Group
from verl_m2po.report.reading.runs import read_runs
from verl_m2po.report.reading.summary import collapse_step, first_reaching, left_out_metric

ACC = "val-core/addition/acc/mean@1"
results = st.lists(st.floats(0, 1), min_size=0, max_size=30)


def series(values) -> pd.Series:
    return pd.Series(values, index=range(0, 10 * len(values), 10), dtype=float)


def test_collapse_is_where_the_last_fall_under_half_of_the_best_begins():
    # best so far 0.6, half of it 0.3: 0.25 at step 40 is the first of the last points that are all below.
    assert collapse_step(series([0.3, 0.5, 0.6, 0.4, 0.25, 0.1, 0.05])) == 40


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.5],
        [0.3, 0.4, 0.5, 0.5],  # rises
        [0.6, 0.1, 0.1, 0.1, 0.5],  # recovers
        [0.6, 0.6, 0.1, 0.1],  # two points are not enough
        [0.0] * 10,  # never rose
        [0.6, 0.31, 0.31, 0.31, 0.31],  # falls, but not by half
    ],
)
def test_no_collapse(values):
    assert collapse_step(series(values)) is None


def test_collapse_of_rewards_that_may_be_negative():
    # floor -1, best 0.6: the line is at -0.2.
    assert collapse_step(series([-0.5, 0.6, -0.1, -0.3, -0.9, -1.0])) == 30


def slow_collapse(values: list[float]) -> int | None:
    floor = min([0.0, *values])
    for start in range(len(values) - 2):
        if all(v - floor < 0.5 * (max(values[: i + 1]) - floor) for i, v in enumerate(values) if i >= start):
            return start
    return None


@settings(deadline=None)
@given(results.filter(lambda values: len(values) > 3))
def test_collapse_equals_trying_every_start(values):
    found = collapse_step(series(values))
    slow = slow_collapse(values)
    assert found == (None if slow is None else 10 * slow)


@settings(deadline=None)
@given(results, st.floats(0.01, 100))
def test_collapse_does_not_depend_on_the_unit(values, factor):
    values = [round(value, 3) for value in values]
    power = 2.0 ** round(math.log2(factor))
    assert collapse_step(series(values)) == collapse_step(series([value * power for value in values]))


def test_first_reaching_counts_the_target_itself():
    assert first_reaching(series([0.1, 0.5, 0.4]), 0.5) == 10
    assert first_reaching(series([0.1]), 0.5) is None


def test_the_numbers_of_the_table(tmp_path):
    """Two seeds, each number known by hand."""
    for seed, last in ((1, 0.6), (2, 0.8)):
        rows = {0: {ACC: 0.2}}
        for step in range(1, 5):
            rows[step] = {"timing_s/step": 2.0, "perf/throughput": 100.0 * seed, "actor/pg_clipfrac": 0.01 * seed}
        rows[2][ACC], rows[4][ACC] = 0.9 if seed == 2 else 0.5, last
        write_log(tmp_path / f"grpo-s4-seed{seed}/attempt-1.jsonl", rows)
    (summary,) = build([tmp_path], target=0.55).summaries
    assert (summary.label, summary.seeds, summary.steps) == ("grpo, s=4", 2, 4)
    assert summary.start.mean == pytest.approx(0.2)
    assert summary.final.mean == pytest.approx(0.7)
    assert summary.final.deviation == pytest.approx(np.std([0.6, 0.8], ddof=1))
    assert summary.best.mean == pytest.approx(0.75)
    assert summary.best_step.mean == pytest.approx(3)  # 4 and 2
    assert summary.reached == 2
    assert summary.steps_to_target.mean == pytest.approx(3)  # 4 and 2
    assert summary.seconds_to_target.mean == pytest.approx(6)  # 8 and 4
    assert summary.collapsed == 0 and summary.collapse_step is None
    assert summary.left_out.mean == pytest.approx(0.015)
    assert summary.tokens_per_second.mean == pytest.approx(150)


def test_final_points_average_the_end(tmp_path):
    write_log(tmp_path / "run.jsonl", {s: {ACC: v} for s, v in enumerate([0.0, 0.2, 0.4])})
    (summary,) = build([tmp_path], final_points=2).summaries
    assert summary.final.mean == pytest.approx(0.3)


def test_the_known_collapse_is_found_and_only_that(tmp_path):
    """`stale_run` lets no_trust_region at staleness fall after 60% of the run, below half at 67%."""
    for loss, k in (("grpo", 0), ("grpo", 64), ("no_trust_region", 64), ("m2po", 64)):
        write_log(tmp_path / f"{loss}-s{4 * k}/attempt-1.jsonl", stale_run(loss, k, seed=1))
    collapsed = {s.label: s.collapse_step for s in build([tmp_path]).summaries}
    found = collapsed.pop("no_trust_region, s=256")
    assert found.mean == 140
    assert set(collapsed.values()) == {None}


def test_a_loss_that_does_not_mask_is_shown_by_its_clip_fraction(tmp_path):
    """Trust-region statistics may be logged for every loss; for GRPO they are not what was left out."""
    both = {"actor/pg_clipfrac": 0.01, "actor/m2po/masked_fraction": 0.0006}
    (run,), _ = read_runs([write_log(tmp_path / "run.jsonl", {1: both})])
    assert left_out_metric(Group("g", (run,), loss="grpo"), run) == "actor/pg_clipfrac"
    assert left_out_metric(Group("m", (run,), loss="m2po"), run) == "actor/m2po/masked_fraction"


@pytest.mark.parametrize(
    ("loss", "logged"), [("no_trust_region", "actor/m2po/masked_fraction"), ("m2po", "actor/pg_clipfrac")]
)
def test_a_loss_that_logs_only_the_other_share_is_shown_by_that(tmp_path, loss, logged):
    write_log(tmp_path / f"{loss}-s4.jsonl", {1: {ACC: 0.5, logged: 0.25}})
    (summary,) = build([tmp_path]).summaries
    assert summary.left_out.mean == 0.25
