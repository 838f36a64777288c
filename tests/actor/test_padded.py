"""Packed values become the padded rows that verl makes of them."""

import pytest
import torch
from host_transfers import no_host_transfers
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.utils.padding import no_padding_2_padding

from verl_m2po.actor.padded import padded_responses

WIDTH = 6


def random_values(prompts: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    return torch.randn(int((prompts + responses).sum()), generator=torch.Generator().manual_seed(0))


def lengths(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of prompts and responses; one of these is as long as can be, and one empty."""
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 5, (7,), generator=generator)
    responses = torch.randint(1, WIDTH, (7,), generator=generator)
    responses[2], responses[5] = WIDTH, 0
    return prompts, responses


def nested(counts: torch.Tensor) -> torch.Tensor:
    return torch.nested.as_nested_tensor([torch.arange(n) for n in counts.tolist()], layout=torch.jagged)


def packed_rows(prompts: torch.Tensor, responses: torch.Tensor) -> TensorDict:
    return TensorDict({"prompts": nested(prompts), "responses": nested(responses)}, batch_size=len(prompts))


def padded_rows(prompts: torch.Tensor, responses: torch.Tensor) -> TensorDict:
    left, right = torch.arange(4).flip(0), torch.arange(WIDTH)
    attended = torch.cat((left < prompts[:, None], right < responses[:, None]), dim=1).long()
    ids = {"prompts": attended[:, :4], "responses": attended[:, 4:], "attention_mask": attended}
    return TensorDict(ids, batch_size=len(prompts))


@pytest.mark.parametrize("rows", [packed_rows, padded_rows])
@pytest.mark.parametrize("seed", range(5))
def test_rows_are_verls(rows, seed):
    prompts, responses = lengths(seed)
    data, values = rows(prompts, responses), random_values(prompts, responses)
    assert torch.equal(padded_responses(values, data), no_padding_2_padding(values, data))
    wide = rows(prompts, responses)
    tu.assign_non_tensor(wide, max_response_len=WIDTH if rows is padded_rows else WIDTH + 3)
    assert torch.equal(padded_responses(values, wide), no_padding_2_padding(values, wide))


def test_a_nested_output_is_taken_as_it_is():
    prompts, responses = lengths(0)
    data, whole = packed_rows(prompts, responses), nested(prompts + responses).float()
    assert torch.equal(padded_responses(whole, data), no_padding_2_padding(whole, data))


def test_what_is_not_of_a_response_does_not_spread():
    """Not even as NaN x 0."""
    prompts, responses = lengths(1)
    data, values = padded_rows(prompts, responses), torch.full((int((prompts + responses).sum()),), torch.nan)
    padded = padded_responses(values, data)
    assert torch.equal(padded.isnan(), data["attention_mask"][:, 4:].bool())


def test_the_host_does_not_wait_for_a_device():
    prompts, responses = lengths(2)
    data = padded_rows(prompts, responses).to("meta")
    with no_host_transfers():
        assert padded_responses(torch.empty(int((prompts + responses).sum()), device="meta"), data).shape == (7, WIDTH)
