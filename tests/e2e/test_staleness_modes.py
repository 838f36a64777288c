"""The staleness modes end to end: the version of every trained row, from the ledger."""

import json

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(480)]

SEPARATE = ("actor_rollout_ref.hybrid_engine=false", "actor_rollout_ref.rollout.nnodes=1")
STEPS, UPDATES_PER_STEP, BATCH, RESPONSES = 8, 2, 8, 4


def run_mode(train, tmp_path, mode: str, staleness_updates: int, *overrides: str, steps: int = STEPS):
    """Train in `mode`; returns the result and the ledger, one entry per sampled batch."""
    ledger = tmp_path / "ledger.jsonl"
    result = train(
        f"trainer.total_training_steps={steps}",
        f"trainer.v1.trainer_mode={mode}",
        f"++trainer.v1.{mode}.staleness_updates={staleness_updates}",
        f"++trainer.v1.{mode}.ledger_path={ledger}",
        *overrides,
    )
    return result, [json.loads(line) for line in ledger.read_text().splitlines()]


def versions_by_step(ledger) -> dict[int, set[int]]:
    versions: dict[int, set[int]] = {}
    for line in ledger:
        spans = [span for group in line["groups"] for row in group[3] for span in row[1]]
        versions.setdefault(line["step"], set()).update(version for version, _ in spans)
    return versions


def assert_every_place_was_trained_once(ledger, steps: int = STEPS) -> None:
    places = [group[2] for line in ledger for group in line["groups"]]
    assert places == list(range(steps * BATCH))
    assert all(len(group[3]) == RESPONSES for line in ledger for group in line["groups"])


@pytest.mark.parametrize("k_steps", [0, 2])
def test_stale_k_is_exact_row_by_row(train, tmp_path, k_steps):
    result, ledger = run_mode(
        train, tmp_path, "stale_k", k_steps * UPDATES_PER_STEP, "trainer.test_freq=4", "trainer.val_before_train=true"
    )
    assert versions_by_step(ledger) == {step: {max(0, step - 1 - k_steps)} for step in range(1, STEPS + 1)}
    assert_every_place_was_trained_once(ledger)
    ages = [UPDATES_PER_STEP * min(step, k_steps) for step in range(STEPS)]
    assert result.series("staleness/age_updates_max") == result.series("staleness/age_updates_mean") == ages
    verls = [age / UPDATES_PER_STEP for age in ages]
    assert result.series("training/off_policy/trajectory_staleness_worst/max") == verls
    assert result.series("training/off_policy/trajectory_staleness/min") == verls
    # Age-zero tokens have only the mismatch between vLLM and the trainer in their ratio: nothing, in float32.
    assert max(result.series("actor/m2po/mismatch_floor")) < 1e-9


def test_stale_k_separate_is_exact_row_by_row(train, tmp_path):
    result, ledger = run_mode(train, tmp_path, "stale_k_separate", 2 * UPDATES_PER_STEP, *SEPARATE)
    assert versions_by_step(ledger) == {step: {max(0, step - 3)} for step in range(1, STEPS + 1)}
    assert_every_place_was_trained_once(ledger)
    assert len(result.series("staleness/age_updates_mean")) == STEPS


def test_bounded_async_keeps_its_bound(train, tmp_path):
    result, ledger = run_mode(train, tmp_path, "bounded_async", UPDATES_PER_STEP, *SEPARATE)
    for line in ledger:
        oldest = line["version"] - 1
        spans = [span for group in line["groups"] for row in group[3] for span in row[1]]
        kept = [version for version, _ in spans if line["oldest_version"] is None or version >= line["oldest_version"]]
        assert oldest <= min(kept) and max(kept) <= line["version"]
    uids = [group[1] for line in ledger for group in line["groups"]]
    assert len(uids) == len(set(uids)) == STEPS * BATCH
    assert max(result.series("staleness/age_updates_max")) <= UPDATES_PER_STEP


def test_stale_k_continues_its_schedule_after_a_restart(train, tmp_path):
    """One run of eight steps against one that stops after four and starts again: same prompts, same versions."""
    updates, small_set = 2 * UPDATES_PER_STEP, f"data.train_max_samples={4 * BATCH}"
    _, whole = run_mode(train, tmp_path / "whole", "stale_k", updates, small_set, "trainer.total_epochs=2")
    saved = ("trainer.save_freq=2", "trainer.resume_mode=auto", f"trainer.default_local_dir={tmp_path / 'saved'}")
    run_mode(train, tmp_path / "halves", "stale_k", updates, small_set, *saved, "trainer.total_epochs=1")
    _, halves = run_mode(train, tmp_path / "halves", "stale_k", updates, small_set, *saved, "trainer.total_epochs=2")
    assert_every_place_was_trained_once(halves)
    assert versions_by_step(halves) == versions_by_step(whole)
    prompts = [[group[0] for line in ledger for group in line["groups"]] for ledger in (whole, halves)]
    assert prompts[0] == prompts[1]
