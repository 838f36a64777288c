"""Images and video in a staleness mode: a tiny Qwen2-VL is trained to name the colour of a square."""

import math
from pathlib import Path

import pytest
from mode_runs import UPDATES_PER_STEP, assert_every_place_was_trained_once, run_mode, versions_by_step

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

REWARD = Path(__file__).parents[1] / "support" / "pictures.py"
RESPONSES = 8
UNREADABLE = 5


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
        f"actor_rollout_ref.model.path={colours}",
        f"data.train_files={colours / 'data' / 'train.parquet'}",
        f"data.val_files={colours / 'data' / 'validation.parquet'}",
        f"reward.custom_reward_function.path={REWARD}",
        f"actor_rollout_ref.rollout.n={RESPONSES}",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.mm_device_do_normalize=false",
        "++trainer.v1.stale_k.journal=true",
        f"trainer.default_local_dir={tmp_path / 'saved'}",
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
