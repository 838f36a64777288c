"""What the experiment bench logs of a batch."""

import json
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from verl import DataProto

from verl_m2po.ground.fields import AGE_FIELD
from verl_m2po.one_process import rollouts, setup, train

PROMPT, WIDTH = 6, 5


def test_lengths_are_without_what_follows_the_end_of_the_turn():
    lengths = torch.tensor([2, 3, 4, 5])
    mask = torch.arange(WIDTH) < lengths[:, None]
    zeros = torch.zeros(mask.shape)
    fields = {
        "prompts": torch.ones(len(lengths), PROMPT, dtype=torch.long),
        "responses": torch.ones(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones(len(lengths), PROMPT + WIDTH, dtype=torch.long),
        "response_mask": mask,
        **dict.fromkeys(("token_level_scores", "token_level_rewards", "advantages", "returns"), zeros),
    }
    metrics = train.data_metrics(DataProto(batch=TensorDict(fields, batch_size=len(lengths))))
    assert [metrics[f"response_length/{name}"] for name in ("mean", "min", "max")] == [3.5, 2, 5]
    assert metrics["response_length/clip_ratio"] == 0.25
    assert metrics["prompt_length/mean"] == PROMPT
    assert metrics["perf/total_num_tokens"] == 4 * PROMPT + 14


def test_groups_of_calls_that_ended_at_different_lengths_are_of_one_length_and_what_is_added_is_masked():
    def group(width):
        mask = torch.ones(2, width, dtype=torch.bool)
        fields = {
            "prompts": torch.ones(2, PROMPT, dtype=torch.long),
            "responses": torch.full((2, width), 7),
            "attention_mask": torch.ones(2, PROMPT + width, dtype=torch.long),
            "response_mask": mask,
            "rollout_log_probs": -mask.float(),
            AGE_FIELD: torch.tensor([4, 4]),
        }
        return TensorDict(fields, batch_size=2)

    long, short = group(5), group(3)
    first, second = rollouts._of_one_length([long, short])
    assert first is long
    assert second["responses"].shape == (2, 5) and second["prompts"].shape == (2, PROMPT)
    assert torch.equal(second["response_mask"], torch.arange(5).expand(2, 5) < 3)
    assert second["attention_mask"].sum() == 2 * (PROMPT + 5) and second["rollout_log_probs"].sum() == -6
    assert torch.equal(second[AGE_FIELD], short[AGE_FIELD])


class LogsOnly:
    """A bench that generates nothing and trains nothing."""

    def __init__(self, *_of_bench):
        pass

    def validate(self):
        return {"accuracy": 0.5}

    def step(self, step):
        return {"step": float(step)}


@pytest.mark.parametrize("logger", ["file", "console", "[console]", "[tensorboard]", "[console,file,tensorboard]"])
def test_whatever_the_loggers_the_log_is_that_of_this_run_and_of_no_earlier_one(tmp_path, monkeypatch, logger):
    """verl takes trainer.logger=file as well as trainer.logger=[file]."""
    monkeypatch.setattr(train, "Bench", LogsOnly)
    for name in ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"):  # the run sets them
        monkeypatch.setenv(name, str(tmp_path))
    overrides = ["staleness=on_policy", "trainer.total_training_steps=1", f"trainer.logger={logger}"]
    (tmp_path / "tensorboard").mkdir()
    earlier = [tmp_path / "attempt-1.jsonl", tmp_path / "tensorboard/events.out.tfevents.1.of-an-earlier-run"]
    for path in earlier:
        path.write_text(json.dumps({"step": 1000, "data": {"step": 1000.0}}) + "\n")
    log = train.train(setup.read(overrides), Path("model"), 3, tmp_path)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][-1] == 1
    assert not earlier[1].exists()
    assert (tmp_path / "tensorboard").exists() == ("tensorboard" in logger)
