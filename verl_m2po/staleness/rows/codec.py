"""How a trajectory is stored while it waits: only what training reads and what cannot be computed again.

verl stores 48 bytes per response token (token ids twice, two masks and positions as int64; log-probs and rewards) and
24 per prompt token. Packed it is 9 and 4: ids as int32, behaviour log-probs as float32, the mask as uint8. What the
data set gave (messages, ground truth, ...) is stored once per group, with the prompt. `unpack` restores verl's rows
exactly, a whole batch at a time, when it is selected.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from verl_m2po.staleness.rows.ragged import Ragged

BYTES_PER_RESPONSE_TOKEN = 9
BYTES_PER_PROMPT_TOKEN = 4
UNPACKED_BYTES_PER_RESPONSE_TOKEN = 48
UNPACKED_BYTES_PER_PROMPT_TOKEN = 24

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


def unpack(packed: Mapping[str, Ragged | list], older_than: "OverAge | None" = None) -> dict[str, torch.Tensor | list]:
    """verl's fields of a batch, without those that the data set gave.

    Args:
        packed: what `pack` returned, a column for each field.
        older_than: tokens to take out of the masks; None takes none.

    Returns:
        Jagged tensors, and a list for each field that is not a tensor. A field that some rows lack is left out.
    """
    prompts = _as_int64(packed["packed_prompt"])
    responses = _as_int64(packed["packed_response"])
    response_mask = _as_int64(packed["packed_mask"])
    if older_than is not None:
        response_mask = response_mask.with_values(older_than.masked(response_mask.values))
    input_ids = prompts.followed_by(responses)
    columns: dict[str, Ragged] = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": response_mask,
        "loss_mask": response_mask,
        "input_ids": input_ids,
        "position_ids": input_ids.with_values(input_ids.places),
    }
    columns |= {k: v for k, v in packed.items() if isinstance(v, Ragged) and k not in _PACKED_TENSORS[:3]}
    rest = _columns_of(packed["rest"])
    if "last_token_reward" in rest:
        rewards = torch.zeros(len(responses.values), dtype=torch.float32)
        rewards[responses.lengths.cumsum(0) - 1] = torch.tensor(rest.pop("last_token_reward"), dtype=torch.float32)
        columns["rm_scores"] = responses.with_values(rewards)
    return {key: column.nested() for key, column in columns.items()} | rest


def masked_copy(packed: dict[str, Any], session_id: int) -> dict[str, Any]:
    """The stored fields of a trajectory as those of another session, no token of which is trained on.

    Args:
        packed: what `pack` returned; it is left as it is.
        session_id: of the other session.
    """
    rest = packed["rest"] | {"session_id": session_id}
    return packed | {"packed_mask": torch.zeros_like(packed["packed_mask"]), "rest": rest}


def _as_int64(column: Any) -> Ragged:
    return column.with_values(column.values.to(torch.int64))


def _columns_of(rows: Any) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in rows[0] if all(key in row for row in rows)}


class OverAge(NamedTuple):
    """Which generated tokens are too old to be trained on.

    Args:
        spans: of each row, (weight version, generated tokens); generated tokens are those with response_mask 1.
        oldest_version: the oldest weight version that may be trained on.
    """

    spans: Sequence[tuple[tuple[int, int], ...]]
    oldest_version: int

    def masked(self, mask: torch.Tensor) -> torch.Tensor:
        """`mask` of all rows, end to end, with the tokens of older versions set to 0.

        Raises:
            ValueError: the spans are not those of the generated tokens.
        """
        versions, tokens = torch.tensor([span for row in self.spans for span in row]).T
        generated = mask.nonzero().squeeze(-1)
        if len(generated) != int(tokens.sum()):
            raise ValueError(f"{len(generated)} generated tokens, but the spans are of {int(tokens.sum())}")
        masked = mask.clone()
        masked[generated[versions.repeat_interleave(tokens) < self.oldest_version]] = 0
        return masked
