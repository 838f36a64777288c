"""The bench with the task of long responses: the config's reward function says what is learnt."""

import json
from pathlib import Path

import pytest

from verl_m2po.one_process import setup as setups
from verl_m2po.one_process import train

CONFIG = "column_addition_staleness"
SMALL = [
    *("loss=m2po", "staleness=s8", "data.train_batch_size=2", "actor_rollout_ref.actor.ppo_mini_batch_size=1"),
    *("actor_rollout_ref.rollout.n=2", "trainer.total_training_steps=2", "trainer.logger=[file]"),
    "trainer.v1.stale_k.staleness_updates=2",
]


def test_a_run_has_responses_of_many_lengths_and_logs_the_accuracy_of_its_task(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(train, "VALIDATION_PROBLEMS", 64)
    monkeypatch.setattr(train, "TRAINING_PROBLEMS", 64)
    setup = setups.read(SMALL, CONFIG)
    assert setup.recipe == setups.RECIPES[CONFIG]
    log = train.train(setup, setups.base_model(setup.recipe), setup.recipe.digits, tmp_path / "run")
    steps = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    assert 0.2 < steps[0]["val-core/column_addition/acc/mean@1"] < 0.5
    assert all(59 < step["response_length/mean"] <= 120 for step in steps[1:])
    assert steps[-1]["staleness/age_updates_max"] == 2


def test_a_task_that_is_not_ours_is_refused_by_its_key():
    other = ["loss=m2po", "reward.custom_reward_function.path=pkg://verl_m2po.tasks.scoring"]
    with pytest.raises(setups.NotOnTheBench, match=r"custom_reward_function\.path=pkg://verl_m2po\.tasks\.scoring"):
        setups.read(other)


def test_the_other_task_of_ours_needs_its_config():
    """Lengths and sizes of the config would not be those of the task."""
    with pytest.raises(setups.NotOnTheBench, match=r"data\.max_response_length"):
        setups.read(["loss=m2po", "task=column_addition"])
