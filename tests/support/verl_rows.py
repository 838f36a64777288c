"""Trajectories as verl's agent loop writes them."""

import torch


def verl_row(prompt: list[int], response: list[int], mask: list[int], reward: float = 0.5) -> dict:
    """A trajectory as verl's agent loop writes it."""
    responses, prompts = torch.tensor(response), torch.tensor(prompt)
    rm_scores = torch.zeros(len(response))
    rm_scores[-1] = reward
    return {
        "prompts": prompts,
        "responses": responses,
        "response_mask": torch.tensor(mask),
        "loss_mask": torch.tensor(mask),
        "input_ids": torch.cat([prompts, responses]),
        "position_ids": torch.arange(len(prompt) + len(response)),
        "rollout_log_probs": -torch.arange(len(response), dtype=torch.float32) / 7,
        "rm_scores": rm_scores,
        "multi_modal_inputs": {},
        "num_turns": 2,
        "extra_fields": {"reward_extra_info": {"acc": 1.0}},
    }


def seeing(row: dict, inputs: dict[str, torch.Tensor], jumps_at: int = 1) -> dict:
    """`row` as the agent loop of a model with images writes it: positions of four axes, which jump after an image."""
    tokens = len(row["input_ids"])
    text = torch.arange(tokens)
    seen = torch.stack([text, *(torch.where(text < jumps_at, text // step, text - jumps_at) for step in (1, 2, 3))])
    return row | {"multi_modal_inputs": inputs, "position_ids": seen}
