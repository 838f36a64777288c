"""How a trajectory is stored while it waits: only what training reads and what cannot be computed again.

verl stores 48 bytes per response token (token ids twice, two masks and positions as int64; log-probs and rewards) and
24 per prompt token. Packed it is 9 and 4: ids as int32, behaviour log-probs as float32, the mask as uint8. What the
data set gave (messages, ground truth, ...) is stored once per group, with the prompt. `unpack` restores verl's row
exactly; that runs once per row, when the row is selected.
"""

from typing import Any

import torch

BYTES_PER_RESPONSE_TOKEN = 9
BYTES_PER_PROMPT_TOKEN = 4

_PACKED_TENSORS = ("packed_prompt", "packed_response", "packed_mask", "rollout_log_probs")
_DERIVED = ("prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids", "rm_scores")


def is_packable(row: dict[str, Any]) -> bool:
    """Whether the row is plain text, whose positions and whole sequence follow from prompt and response."""
    position_ids = row["position_ids"]
    return position_ids.dim() == 1 and not row.get("multi_modal_inputs")


def pack(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of `row` that must be stored.

    Args:
        row: fields of one trajectory as verl's agent loop writes them: 1-d tensors and Python objects.

    Returns:
        Packed tensors, and under "rest" every field that is neither a tensor of the token sequence nor derived from it.
    """
    packed = {
        "packed_prompt": row["prompts"].to(torch.int32),
        "packed_response": row["responses"].to(torch.int32),
        "packed_mask": row["response_mask"].to(torch.uint8),
    }
    if "rollout_log_probs" in row:
        packed["rollout_log_probs"] = row["rollout_log_probs"].to(torch.float32)
    rest = {key: value for key, value in row.items() if key not in _DERIVED and key not in packed}
    packed |= {key: rest.pop(key) for key in [k for k, v in rest.items() if isinstance(v, torch.Tensor) and v.dim()]}
    if "rm_scores" in row:
        rest["last_token_reward"] = float(row["rm_scores"][-1])
    return packed | {"rest": rest}


def unpack(packed: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """verl's fields of one trajectory.

    Args:
        packed: what `pack` returned.
        shared: fields that all trajectories of the group have in common.
    """
    prompts = packed["packed_prompt"].to(torch.int64)
    responses = packed["packed_response"].to(torch.int64)
    response_mask = packed["packed_mask"].to(torch.int64)
    rest = dict(packed["rest"])
    row: dict[str, Any] = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": response_mask,
        "loss_mask": response_mask,
        "input_ids": torch.cat([prompts, responses]),
        "position_ids": torch.arange(len(prompts) + len(responses), dtype=torch.int64),
    }
    row |= {key: value for key, value in packed.items() if key not in ("rest", *_PACKED_TENSORS[:3])}
    if "last_token_reward" in rest:
        rm_scores = torch.zeros_like(response_mask, dtype=torch.float32)
        rm_scores[-1] = rest.pop("last_token_reward")
        row["rm_scores"] = rm_scores
    return shared | row | rest


def mask_older_tokens(row: dict[str, Any], spans: tuple[tuple[int, int], ...], oldest_version: int) -> int:
    """Take the tokens that are older than `oldest_version` out of the masks of `row`, in place.

    Args:
        row: verl's fields of one trajectory; `response_mask` and `loss_mask` are replaced.
        spans: (weight version, generated tokens); generated tokens are those with response_mask 1, in order.
        oldest_version: the oldest weight version that may be trained on.

    Returns:
        How many tokens were masked.
    """
    mask = row["response_mask"].clone()
    generated = mask.nonzero().squeeze(-1)
    first, masked = 0, 0
    for version, tokens in spans:
        if version < oldest_version:
            mask[generated[first : first + tokens]] = 0
            masked += tokens
        first += tokens
    row["response_mask"] = mask
    row["loss_mask"] = mask
    return masked
