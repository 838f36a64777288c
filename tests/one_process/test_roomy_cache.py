"""Generation with room in the cache is generation without it, token by token and bit by bit."""

import pytest
import torch

from verl_m2po.one_process.rollouts import prompt_cache
from verl_m2po.one_process.roomy_cache import with_room
from verl_m2po.tasks import tiny_model

PROMPT, NEW = 7, 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model.make_model(tiny_model.SMALL, tiny_model.make_tokenizer())


@torch.no_grad()
def test_the_same_tokens_and_logits(model):
    prompts = torch.randint(0, 250, (3, PROMPT), generator=torch.Generator().manual_seed(1))

    def generate(room: int | None):
        cache = prompt_cache(model, prompts, 2)
        torch.manual_seed(2)
        repeated = prompts.repeat_interleave(2, dim=0)
        return model.generate(
            input_ids=repeated,
            attention_mask=torch.ones_like(repeated),
            past_key_values=cache if room is None else with_room(cache, room),
            max_new_tokens=NEW,
            do_sample=True,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )

    without, with_it, with_more = generate(None), generate(NEW), generate(5 * NEW)
    for other in (with_it, with_more):
        assert torch.equal(without.sequences, other.sequences)
        assert all(torch.equal(a, b) for a, b in zip(without.logits, other.logits, strict=True))


@torch.no_grad()
def test_what_is_held_is_what_was_written_and_more_than_there_is_room_for_is_an_error(model):
    cache = with_room(prompt_cache(model, torch.arange(PROMPT)[None], 1), 2)
    before = cache.layers[0].keys.clone()
    written = torch.randn(1, 1, 2, 32, generator=torch.Generator().manual_seed(3))
    keys, values = cache.update(written, -written, 0)
    assert torch.equal(keys, torch.cat((before, written), -2)) and torch.equal(values[..., -2:, :], -written)
    assert cache.get_seq_length() == PROMPT + 1
    with pytest.raises(RuntimeError):
        cache.update(written, written, 0)
