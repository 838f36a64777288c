"""How a trajectory is stored while it waits: only what training reads and what cannot be computed again.

verl stores 48 bytes per response token (token ids twice, two masks and positions as int64; log-probs and rewards) and
24 per prompt token. Packed it is 9 and 4: ids as int32, behaviour log-probs as float32, the mask as uint8. What the
data set gave (messages, ground truth, ...) is stored once per group, with the prompt; so are images (media.py).
`unpack` restores verl's rows exactly, a whole batch at a time, when it is selected.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from verl_m2po.staleness.rows import media
from verl_m2po.staleness.rows.ragged import Ragged

BYTES_PER_RESPONSE_TOKEN = 9
BYTES_PER_PROMPT_TOKEN = 4
UNPACKED_BYTES_PER_RESPONSE_TOKEN = 48
UNPACKED_BYTES_PER_PROMPT_TOKEN = 24

_UNPACKED = ("packed_prompt", "packed_response", "packed_mask", "media")
_DERIVED = ("prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids", "rm_scores")


def pack(row: dict[str, Any], key: str = "", pool: media.Pool | None = None) -> dict[str, Any]:
    """The fields of `row` that must be stored.

    Args:
        row: fields of one trajectory as verl's agent loop writes them: tensors of its tokens and Python objects.
        key: of the row.
        pool: of its group, where the model has a processor of images; None for plain text, whose positions follow from
            its length.

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
    rest = {name: value for name, value in row.items() if name not in _DERIVED and name not in packed}
    packed |= {name: rest.pop(name) for name in [k for k, v in rest.items() if isinstance(v, torch.Tensor) and v.dim()]}
    if "rm_scores" in row:
        rest["last_token_reward"] = float(row["rm_scores"][-1])
    if pool is not None:
        tensors, rest["multi_modal_inputs"] = media.split_inputs(rest["multi_modal_inputs"])
        if row["position_ids"].dim() > 1:
            tensors[media.POSITIONS] = media.cut_positions(row["position_ids"])
        packed["media"], rest["made_of"] = pool.pack(key, tensors)
    return packed | {"rest": rest}


def unpack(
    packed: Mapping[str, Ragged | list], older_than: "OverAge | None" = None, keys: Sequence[str] = ()
) -> dict[str, torch.Tensor | list]:
    """verl's fields of a batch, without those that the data set gave.

    Args:
        packed: what `pack` returned, a column for each field.
        older_than: tokens to take out of the masks; None takes none.
        keys: of the rows, whole groups; needed where there are images.

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
    columns |= {k: v for k, v in packed.items() if isinstance(v, Ragged) and k not in _UNPACKED}
    rest = _columns_of(packed["rest"])
    if "last_token_reward" in rest:
        rewards = torch.zeros(len(responses.values), dtype=torch.float32)
        rewards[responses.lengths.cumsum(0) - 1] = torch.tensor(rest.pop("last_token_reward"), dtype=torch.float32)
        columns["rm_scores"] = responses.with_values(rewards)
    unpacked = {key: column.nested() for key, column in columns.items()} | rest
    if "media" in packed:
        unpacked |= _with_media(unpacked.pop("made_of"), rest["multi_modal_inputs"], packed["media"], keys, input_ids)
    return unpacked


def _with_media(
    made_of: Any, values: Sequence[Mapping[str, Any]], stored: Any, keys: Sequence[str], input_ids: Ragged
) -> dict[str, Any]:
    """verl's `multi_modal_inputs` of each row, and the positions, where these have several axes."""
    tensors = media.unpack(keys, stored.rows(), made_of)
    cut = [of_row.pop(media.POSITIONS) for of_row in tensors if media.POSITIONS in of_row]
    fields: dict[str, Any] = {
        "multi_modal_inputs": [of_row | dict(more) for of_row, more in zip(tensors, values, strict=True)]
    }
    if cut:
        lengths = input_ids.lengths.tolist()
        whole = [media.extend_positions(*each) for each in zip(cut, lengths, strict=True)]
        fields["position_ids"] = media.jagged_positions(whole)
    return fields


def masked_copy(packed: dict[str, Any], session_id: int) -> dict[str, Any]:
    """The stored fields of a trajectory as those of another session, no token of which is trained on.

    Args:
        packed: what `pack` returned; it is left as it is.
        session_id: of the other session.
    """
    copy = packed | {"packed_mask": torch.zeros_like(packed["packed_mask"])}
    if "media" in packed:
        copy["media"] = media.nothing()  # it lies with the other session
    return copy | {"rest": packed["rest"] | {"session_id": session_id}}


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
