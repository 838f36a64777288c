"""Response tokens as rows of one length, cut out of what an engine packs."""

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils import tensordict_utils as tu


def padded_responses(packed: Tensor, data: TensorDict) -> Tensor:
    """What verl's `no_padding_2_padding` gives, which makes the host wait for the device once for every row.

    Args:
        packed: float [tokens], or nested [rows, tokens]: at each token of all rows, prompts too, the value of the next.
        data: `prompts` and `responses` of the rows, nested, or padded together with an `attention_mask`.

    Returns:
        float [rows, response]; 0 after the end of a response.
    """
    values = packed.values() if packed.is_nested else packed
    prompts, responses, width = _lengths(data)
    ends = (prompts + responses).cumsum(0)
    position = torch.arange(width, device=values.device)
    # The value of the first response token stands at the last one of the prompt.
    at = (ends - responses - 1).unsqueeze(-1) + position
    is_token = position < responses.unsqueeze(-1)
    return torch.where(is_token, values[at.clamp(max=len(values) - 1)], 0.0)


def _lengths(data: TensorDict) -> tuple[Tensor, Tensor, int]:
    """int64 [rows] of prompts and of responses, and how long a padded response is."""
    prompt_ids: Any = data["prompts"]
    response_ids: Any = data["responses"]
    if not prompt_ids.is_nested:
        attended = data["attention_mask"]
        of_prompt, of_response = attended.split([prompt_ids.shape[1], response_ids.shape[1]], dim=1)
        return of_prompt.sum(1), of_response.sum(1), response_ids.shape[1]
    responses = response_ids.offsets().diff()
    width: Any = tu.get_non_tensor_data(data=data, key="max_response_len", default=-1)
    return prompt_ids.offsets().diff(), responses, int(responses.max()) if width < 0 else width
