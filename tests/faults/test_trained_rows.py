"""The rule that the fault campaign checks: each way of breaking it is found."""

import copy
import dataclasses

import pytest
from trained_rows import Promise, broken, redone_steps, surviving

STEPS, BATCH, RESPONSES, K = 6, 4, 2, 2
ORDER = [7 * i % 64 for i in range(64)]


def line(step: int, version: int | None = None) -> dict:
    version = max(0, step - 1 - K) if version is None else version
    places = range((step - 1) * BATCH, step * BATCH)
    groups = [[ORDER[p], f"u{p}", p, [[f"u{p}_{r}_0", [[version, 5]]] for r in range(RESPONSES)]] for p in places]
    return {"step": step, "version": step - 1, "oldest_version": None, "groups": groups}


def promise(mode: str) -> Promise:
    return Promise(mode, K, STEPS, BATCH, RESPONSES, ORDER)


def killed_twice() -> list[list[dict]]:
    """Killed in step 4 and resumed after step 2; killed before its first step; then to the end."""
    again = [line(step) for step in range(3, STEPS + 1)]
    return [[line(1), line(2), line(3), line(4)], [{"resumed_from": 2}], [{"resumed_from": 2}, *again]]


@pytest.mark.parametrize("mode", ["stale_k", "stale_k_separate", "bounded_async"])
def test_a_run_that_was_killed_and_resumed_keeps_its_promise(mode):
    assert broken(killed_twice(), promise(mode)) == []


def test_what_is_done_again_is_counted_once():
    assert [each["step"] for each in surviving(killed_twice())] == [1, 2, 3, 4, 5, 6]
    assert redone_steps([killed_twice()[0], killed_twice()[2]]) == [2]


@pytest.mark.parametrize("mode", ["stale_k", "bounded_async"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda last: last.pop(), "groups per step"),
        (lambda last: last[1]["groups"].pop(), "groups per step"),
        (lambda last: last[1]["groups"].__setitem__(0, last[2]["groups"][0]), "trained twice: group"),
        (lambda last: last[1]["groups"][0].__setitem__(0, last[2]["groups"][0][0]), "trained twice: prompt"),
        (lambda last: last[1]["groups"][0][3].pop(), "not 2 trajectories"),
        (lambda last: last[3].update(line(5, version=5)), "weight versions [5]"),
        (lambda last: last[4].update(line(6, version=2)), "weight versions [2]"),
    ],
    ids=["a step is missing", "a group is missing", "doubled", "a prompt twice", "a row is missing", "future", "old"],
)
def test_every_breach_is_found(mode, spoil, said):
    attempts = copy.deepcopy(killed_twice())
    spoil(attempts[-1])
    assert any(said in problem for problem in broken(attempts, promise(mode))), broken(attempts, promise(mode))


def test_exact_modes_train_in_the_order_of_the_data_loader():
    attempts = copy.deepcopy(killed_twice())
    groups = attempts[-1][2]["groups"]
    groups[0][0], groups[1][0] = groups[1][0], groups[0][0]
    assert any("the data loader gives" in problem for problem in broken(attempts, promise("stale_k")))
    assert broken(attempts, promise("bounded_async")) == [], "asynchronous groups end in any order"


def test_bounded_async_skips_no_prompt():
    attempts = copy.deepcopy(killed_twice())
    for each in attempts[-1][1:]:
        for group in each["groups"]:
            group[0] = ORDER[group[2] + (K + 1) * BATCH + 1]
    assert any("skipped" in problem for problem in broken(attempts, promise("bounded_async")))


def test_a_masked_trajectory_is_there_once_in_the_groups_that_are_to_have_one_and_in_no_other():
    attempts = copy.deepcopy(killed_twice())
    masked = [
        group for attempt in attempts for each in attempt for group in each.get("groups", ()) if group[2] % 3 == 0
    ]
    for group in masked:
        group[3][1][1][0][1] = 0
    prompts = frozenset(group[0] for group in masked)
    to_mask = dataclasses.replace(promise("stale_k"), masked=prompts)
    assert broken(attempts, to_mask) == []
    assert "has trajectories of [5, 0] tokens" in broken(attempts, promise("stale_k"))[0]
    masked[-1][3][1][1][0][1] = 5
    assert any("has trajectories of [5, 5] tokens" in problem for problem in broken(attempts, to_mask))
