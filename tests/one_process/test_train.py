"""What the experiment bench logs of a batch."""

import torch
from tensordict import TensorDict
from verl import DataProto

from verl_m2po.one_process import train

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
