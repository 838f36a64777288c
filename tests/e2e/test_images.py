"""Images and video in the staleness modes: a tiny Qwen2-VL is trained to name the colour of a square."""

import math
from pathlib import Path

import pytest
from mode_runs import SEPARATE, UPDATES_PER_STEP, assert_every_place_was_trained_once, run_mode, versions_by_step

from verl_m2po.staleness.restart.checkpoint import POINTER, Checkpoints

pytestmark = [pytest.mark.e2e, pytest.mark.workload, pytest.mark.timeout(900)]

REWARD = Path(__file__).parents[1] / "support" / "pictures.py"
RESPONSES = 8
UNREADABLE = 5


def of_pictures(colours: Path, *overrides: str) -> list[str]:
    """Overrides that train the model in `colours` on its pictures."""
    return [
        f"actor_rollout_ref.model.path={colours}",
        f"data.train_files={colours / 'data' / 'train.parquet'}",
        f"data.val_files={colours / 'data' / 'validation.parquet'}",
        f"reward.custom_reward_function.path={REWARD}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.mm_device_do_normalize=false",
        *overrides,
    ]


@pytest.mark.feature("images and video", mode="stale_k")
@pytest.mark.feature("a journal", mode="stale_k")
def test_the_trainer_sees_what_the_rollout_saw(train, tmp_path, colours, seeing):
    """Three prompts of four have a picture, one a video; the images wait with their rollouts for a trainer step."""
    steps, k_steps = 10, 1
    (colours / "data" / "train" / f"{UNREADABLE}-0.png").unlink()
    result, ledger = run_mode(
        train,
        tmp_path,
        "stale_k",
        k_steps * UPDATES_PER_STEP,
        *of_pictures(colours, "++trainer.v1.stale_k.journal=true", f"trainer.default_local_dir={tmp_path / 'saved'}"),
        steps=steps,
        environment=seeing,
    )
    assert versions_by_step(ledger) == {step: {max(0, step - 1 - k_steps)} for step in range(1, steps + 1)}
    assert_every_place_was_trained_once(ledger, steps, responses=RESPONSES)
    # The trainer sees what the rollout saw: in float32 both give the tokens the same probabilities, the first batch's
    # before any update.
    assert max(result.series("actor/m2po/mismatch_floor")) < 1e-9
    # Eight prompts a step are too few, and ten steps too short, to tell what is learnt from chance.
    assert all(0 < norm < math.inf for norm in result.series("actor/grad_norm"))
    assert 0.2 < sum(result.series("critic/score/mean")) / steps < 1
    assert result.series("staleness/prefetched")[1:] == [8] * (steps - 1)
    # A picture that is not there fails its group, which says of which prompt it was; another takes its place.
    assert sum(result.series("staleness/evicted_failed")) >= 1
    assert f"the group of prompt {UNREADABLE} failed: FileNotFoundError" in result.output


@pytest.mark.feature("images and video", mode="stale_k_separate")
@pytest.mark.feature("a journal", mode="stale_k_separate")
@pytest.mark.timeout(1500)  # two runs
def test_pictures_that_wait_outlive_the_run_that_they_wait_in(train, tmp_path, colours, seeing):
    """Six steps; then as if it had died before checkpoint 4, with the journal of what was generated since."""
    steps, k_steps, checkpoints = 6, 1, Checkpoints(tmp_path / "saved")

    def run():
        return run_mode(
            train,
            tmp_path / "run",
            "stale_k_separate",
            k_steps * UPDATES_PER_STEP,
            *SEPARATE,
            *of_pictures(colours, "++trainer.v1.stale_k_separate.journal=true", "trainer.save_freq=2"),
            f"trainer.default_local_dir={checkpoints.root}",
            "trainer.resume_mode=auto",
            steps=steps,
            environment=seeing,
        )

    first, whole = run()
    assert_every_place_was_trained_once(whole, steps, responses=RESPONSES)
    assert max(first.series("actor/m2po/mismatch_floor")) < 1e-9
    (checkpoints.root / POINTER).write_text("2")
    second, redone = run()
    assert [line["groups"] for line in redone] == [line["groups"] for line in whole], "something was generated again"
    # With another picture, or without one, a response would have another probability.
    assert second.series("actor/loss") == pytest.approx(first.series("actor/loss")[2:], rel=1e-3, abs=1e-6)
    assert second.series("actor/grad_norm") == pytest.approx(first.series("actor/grad_norm")[2:], rel=1e-3)


@pytest.mark.feature("images and video", mode="bounded_async")
def test_what_is_in_a_picture_is_learnt_from_rollouts_of_older_weights(train, tmp_path, colours, seeing):
    """The base model names a colour right about half of the time."""
    steps = 40
    result, _ = run_mode(
        train,
        tmp_path,
        "bounded_async",
        2 * UPDATES_PER_STEP,
        *SEPARATE,
        *of_pictures(colours, "actor_rollout_ref.actor.optim.lr=3e-4", "data.train_batch_size=16"),
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        steps=steps,
        environment=seeing,
    )
    scores = result.series("critic/score/mean")
    assert 0 < max(result.series("staleness/age_updates_max")) <= 2 * UPDATES_PER_STEP
    assert sum(scores[-10:]) / 10 > sum(scores[:5]) / 5 + 0.2
