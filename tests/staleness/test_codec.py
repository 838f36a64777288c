"""Stored rows: small, and restored exactly."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from verl_m2po.staleness import codec


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


@st.composite
def rows(draw):
    ids = st.integers(0, 2**31 - 1)
    response = draw(st.lists(ids, min_size=1, max_size=30))
    mask = draw(st.lists(st.sampled_from([0, 1]), min_size=len(response), max_size=len(response)))
    return verl_row(draw(st.lists(ids, min_size=1, max_size=30)), response, mask, draw(st.floats(-2, 2, width=32)))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert a[key].dtype == b[key].dtype, key
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
        else:
            assert a[key] == b[key], key


@given(rows())
def test_unpack_restores_what_was_packed(row):
    shared = {"raw_prompt": [{"role": "user", "content": "1+1?"}], "uid": "u"}
    assert_same(codec.unpack(codec.pack(row), shared), shared | row)


def test_further_tensors_survive():
    row = verl_row([1, 2], [3, 4], [1, 1]) | {"teacher_logprobs": torch.rand(4, 3), "session_id": 1}
    assert_same(codec.unpack(codec.pack(row), {}), row)


def test_bytes_per_token_are_as_stated():
    def size(prompt, response):
        packed = codec.pack(verl_row([1] * prompt, [1] * response, [1] * response))
        return sum(v.nbytes for v in packed.values() if isinstance(v, torch.Tensor))

    assert size(1, 11) - size(1, 10) == codec.BYTES_PER_RESPONSE_TOKEN
    assert size(11, 1) - size(10, 1) == codec.BYTES_PER_PROMPT_TOKEN


@given(rows(), st.lists(st.integers(0, 6), max_size=5), st.integers(0, 8))
def test_masking_older_tokens_equals_masking_them_one_by_one(row, versions, oldest):
    """Each generated token (response_mask 1) has one version, in order; the others (tools) have none."""
    before = row["response_mask"].tolist()
    generated = [i for i, keep in enumerate(before) if keep]
    of_token = [versions[i * len(versions) // len(generated)] if versions else 0 for i in range(len(generated))]
    spans = tuple((version, 1) for version in of_token)
    expected = list(before)
    for position, version in zip(generated, of_token, strict=True):
        if version < oldest:
            expected[position] = 0
    masked = codec.mask_older_tokens(row, spans, oldest)
    assert row["response_mask"].tolist() == row["loss_mask"].tolist() == expected
    assert masked == sum(before) - sum(expected)


def test_what_is_not_text_is_recognised():
    row = verl_row([1], [2], [1])
    assert codec.is_packable(row)
    assert not codec.is_packable(row | {"position_ids": torch.zeros(3, 2)})
    assert not codec.is_packable(row | {"multi_modal_inputs": {"pixel_values": torch.zeros(1)}})


def test_a_row_without_rewards_or_log_probs_stays_without():
    row = verl_row([1], [2, 3], [1, 1])
    del row["rm_scores"], row["rollout_log_probs"]
    assert_same(codec.unpack(codec.pack(row), {}), row)
