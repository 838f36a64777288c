"""Stored rows: small, and restored exactly."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl_rows import verl_row

from verl_m2po.staleness.rows import codec
from verl_m2po.staleness.rows.ragged import Ragged


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


def restored(batch: list[dict], over_age: codec.OverAge | None = None) -> list[dict]:
    """Pack each row, unpack them together, as one dict per row."""
    packed = [codec.pack(row) for row in batch]
    columns = {}
    for key in packed[0]:
        values = [row[key] for row in packed]
        is_tensor = isinstance(values[0], torch.Tensor)
        columns[key] = Ragged(torch.cat(values), torch.tensor([len(v) for v in values])) if is_tensor else values
    unpacked = codec.unpack(columns, over_age)
    return [
        dict(zip(unpacked, row, strict=True))
        for row in zip(*(v.unbind() if isinstance(v, torch.Tensor) else v for v in unpacked.values()), strict=True)
    ]


@settings(deadline=None, max_examples=40)
@given(st.lists(rows(), min_size=1, max_size=5))
def test_unpack_restores_what_was_packed(batch):
    for before, after in zip(batch, restored(batch), strict=True):
        assert_same(after, before)


def test_further_tensors_survive():
    batch = [
        verl_row([1] * n, [3] * n, [1] * n)
        | {"teacher_logprobs": torch.rand(2 * n, 3), "session_id": n}
        | {"routed_experts": torch.randint(8, (2 * n, 2, 4), dtype=torch.int16)}
        for n in (2, 5)
    ]
    for before, after in zip(batch, restored(batch), strict=True):
        assert_same(after, before)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.data())
def test_ragged_columns_do_as_lists_do(rows, data):
    def ragged(lists):
        return Ragged(torch.tensor([*chain(*lists)], dtype=torch.int64), torch.tensor([len(row) for row in lists]))

    def lists(column):
        return [part.tolist() for part in column.values.split(column.lengths.tolist())]

    assert lists(ragged(rows).followed_by(ragged(rows[::-1]))) == [a + b for a, b in zip(rows, rows[::-1], strict=True)]
    order = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=8))
    assert lists(ragged(rows).take(torch.tensor(order))) == [rows[i] for i in order]
    assert ragged(rows).places.tolist() == [i for row in rows for i in range(len(row))]
    assert lists(Ragged.join([ragged(rows), ragged(rows)])) == rows * 2
    if all(rows):
        assert [row.tolist() for row in ragged(rows).nested().unbind()] == rows


def test_bytes_per_token_are_as_stated():
    def size(prompt, response):
        packed = codec.pack(verl_row([1] * prompt, [1] * response, [1] * response))
        return sum(v.nbytes for v in packed.values() if isinstance(v, torch.Tensor))

    assert size(1, 11) - size(1, 10) == codec.BYTES_PER_RESPONSE_TOKEN
    assert size(11, 1) - size(10, 1) == codec.BYTES_PER_PROMPT_TOKEN


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(rows(), st.lists(st.integers(0, 6), max_size=5)), min_size=1, max_size=4), st.integers(0, 8))
def test_masking_older_tokens_equals_masking_them_one_by_one(batch, oldest):
    """Each generated token (response_mask 1) has one version, in order; the others (tools) have none."""
    expected, spans = [], []
    for row, versions in batch:
        mask = row["response_mask"].tolist()
        generated = [i for i, keep in enumerate(mask) if keep]
        of_token = [versions[i * len(versions) // len(generated)] if versions else 0 for i in range(len(generated))]
        spans.append(tuple((version, 1) for version in of_token))
        for position, version in zip(generated, of_token, strict=True):
            if version < oldest:
                mask[position] = 0
        expected.append(mask)
    if not any(spans):
        return
    after = restored([row for row, _ in batch], codec.OverAge(spans, oldest))
    assert [row["response_mask"].tolist() for row in after] == expected
    assert [row["loss_mask"].tolist() for row in after] == expected


@settings(deadline=None, max_examples=40)
@given(rows(), st.integers(0, 9), st.integers(0, 3))
def test_a_masked_copy_differs_in_its_session_and_in_having_no_trained_token(row, session_id, oldest):
    """Beside what it copies, whose tokens are of the versions 1 and 2, and after masking what is too old."""
    tokens = int(row["response_mask"].sum())
    spans = ((1, tokens // 2), (2, tokens - tokens // 2))
    copy = codec.masked_copy(codec.pack(row | {"session_id": 7}), session_id)
    original = codec.pack(row | {"session_id": 7})
    columns = {
        key: Ragged(torch.cat([original[key], copy[key]]), torch.tensor([len(original[key]), len(copy[key])]))
        for key in original.keys() - {"rest"}
    } | {"rest": [original["rest"], copy["rest"]]}
    over_age = codec.OverAge([spans, tuple((version, 0) for version, _ in spans)], oldest)
    for older_than in (None, over_age):
        unpacked = codec.unpack(columns, older_than)
        of_original, of_copy = (
            {key: column[i] for key, column in unpacked.items() if key != "session_id"} for i in range(2)
        )
        trained = sum(n for version, n in spans if older_than is None or version >= oldest)
        for key in ("response_mask", "loss_mask"):
            assert int(of_original.pop(key).sum()) == trained
            assert not of_copy.pop(key).any()
        assert_same(of_copy, of_original)
        assert unpacked["session_id"] == [7, session_id]


def test_spans_of_other_tokens_are_refused():
    with pytest.raises(ValueError, match="2 generated tokens, but the spans are of 3"):
        restored([verl_row([1], [2, 3], [1, 1])], codec.OverAge([((0, 3),)], oldest_version=1))


def test_a_row_without_rewards_or_log_probs_stays_without():
    row = verl_row([1], [2, 3], [1, 1])
    del row["rm_scores"], row["rollout_log_probs"]
    (after,) = restored([row])
    assert_same(after, row)
