"""Rows with images: restored exactly, and what they have in common is stored once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from verl_rows import seeing, verl_row

from verl_m2po.staleness.restart.frames import FinishedGroup, decode, encode
from verl_m2po.staleness.rows import codec, media
from verl_m2po.staleness.rows.ragged import Ragged
from verl_m2po.staleness.rule.records import Row

PATCH = 6


def image(name: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid of an image: those of a name are always the same."""
    grid = torch.tensor([1, 1 + name % 2, 1 + name % 3])
    return torch.full((int(grid.prod()), PATCH), float(name)), grid


def inputs_of(names: list[int]) -> dict[str, torch.Tensor]:
    """As Qwen2-VL's processor returns the images `names` of a row."""
    if not names:
        return {}
    pixels, grids = zip(*map(image, names), strict=True)
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.stack(grids)}


def packed(rows: list[dict]) -> list[dict]:
    """The rows of one group."""
    pool = media.Pool()
    return [codec.pack(row, f"g_{i}_0", pool) for i, row in enumerate(rows)]


def columns_of(stored: list[dict]) -> dict:
    columns = {}
    for name in stored[0]:
        values = [row[name] for row in stored]
        is_tensor = isinstance(values[0], torch.Tensor)
        columns[name] = Ragged(torch.cat(values), torch.tensor([len(v) for v in values])) if is_tensor else values
    return columns


def restored(stored: list[dict]) -> list[dict]:
    keys = [f"g_{i}_0" for i in range(len(stored))]
    unpacked = codec.unpack(columns_of(stored), None, keys)
    position_ids = unpacked.pop("position_ids")
    ends = position_ids.offsets().tolist()
    rows = [dict(zip(unpacked, row, strict=True)) for row in zip(*unpacked.values(), strict=True)]
    for i, row in enumerate(rows):
        row["position_ids"] = position_ids.values()[..., ends[i] : ends[i + 1]]
    return rows


def assert_same(after, before) -> None:
    if isinstance(before, dict):
        assert after.keys() == before.keys()
        for key in before:
            assert_same(after[key], before[key])
    elif isinstance(before, torch.Tensor):
        assert after.dtype == before.dtype and torch.equal(after, before)
    else:
        assert after == before


def row_of(response: int, names: list[int], jumps_at: int = 1) -> dict:
    return seeing(verl_row([1, 2, 3], [5] * response, [1] * response), inputs_of(names), jumps_at)


@st.composite
def groups(draw):
    """Images of the prompt, which all rows have, and further ones, of tools, in each row."""
    prompt = draw(st.lists(st.integers(0, 5), max_size=3))
    jumps_at = draw(st.integers(1, 3))
    more = draw(st.lists(st.lists(st.integers(0, 9), max_size=2), min_size=1, max_size=4))
    return [row_of(1 + i, prompt + names, jumps_at) for i, names in enumerate(more)]


@settings(deadline=None, max_examples=60)
@given(groups())
def test_rows_come_back_as_they_were_and_each_image_is_stored_once(rows):
    stored = packed(rows)
    for after, before in zip(restored(stored), rows, strict=True):
        assert_same(after, before)
    names = {int(patch[0]) for row in rows for patch in row["multi_modal_inputs"].get("pixel_values", ())}
    pixels = sum(image(name)[0].nbytes for name in names)
    values = [value for row in stored if len(row["media"]) for value in _load(row["media"]).values()]
    assert sum(value.nbytes for value in values if value.is_floating_point()) == pixels


def _load(data: torch.Tensor) -> dict[str, torch.Tensor]:
    import safetensors.torch

    return safetensors.torch.load(data.numpy().tobytes())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=8), st.integers(0, 9))
def test_positions_are_cut_where_they_only_count_on(steps, text):
    positions = torch.cat([torch.tensor(steps).T, torch.ones(3, text, dtype=torch.int64)], dim=1).cumsum(1)
    cut = media.cut_positions(positions)
    assert torch.equal(media.extend_positions(cut, positions.shape[1]), positions)
    assert cut.shape[1] <= len(steps), "text costs nothing"


def test_a_response_of_text_costs_what_it_costs_without_an_image():
    def size(response: int) -> int:
        return sum(v.nbytes for v in packed([row_of(response, [4])])[0].values() if isinstance(v, torch.Tensor))

    assert size(1000) - size(10) == 990 * codec.BYTES_PER_RESPONSE_TOKEN


def test_plain_text_has_no_field_of_images():
    assert codec.pack(verl_row([1], [2], [1])).keys() == {
        "packed_prompt",
        "packed_response",
        "packed_mask",
        "rollout_log_probs",
        "rest",
    }


def test_rows_whose_model_has_one_axis_of_positions_keep_their_images():
    row = verl_row([1, 2], [3], [1]) | {"multi_modal_inputs": inputs_of([3])}
    (after,) = restored(packed([row]))
    assert_same(after, row)


def test_what_a_processor_returns_besides_tensors_comes_back():
    row = row_of(2, [1])
    row["multi_modal_inputs"]["image_bound"] = [[0, 4]]
    (after,) = restored(packed([row]))
    assert_same(after, row)


def test_a_masked_copy_has_its_siblings_images_without_storing_them_again():
    rows = [row_of(2, [1, 2]) | {"session_id": 0}, row_of(3, [1]) | {"session_id": 1}]
    first, second = packed(rows)
    copy = codec.masked_copy(first, session_id=2)
    assert len(copy["media"]) == 0 < len(first["media"])
    *_, after = restored([first, second, copy])
    assert not after.pop("response_mask").any() and not after.pop("loss_mask").any()
    expected = {k: v for k, v in rows[0].items() if k not in ("response_mask", "loss_mask")}
    assert_same(after, expected | {"session_id": 2})


@settings(deadline=None, max_examples=20)
@given(groups())
def test_the_journal_gives_back_the_images_of_a_group(rows):
    stored = packed(rows)
    known = tuple(Row(f"g_{i}_0", 3, len(row["responses"]), ((0, 1),)) for i, row in enumerate(rows))
    group = decode(encode(FinishedGroup("g", known, tuple(stored))))
    for after, before in zip(restored(list(group.packed)), rows, strict=True):
        assert_same(after, before)


def test_a_row_that_was_not_stored_holds_nothing_for_the_others():
    pool = media.Pool()
    attempt = pool.copy()
    attempt.pack("g_0_0", inputs_of([1]))
    data, made_of = pool.pack("g_1_0", inputs_of([1]))
    assert len(data) and {place[0] for places in made_of.values() for place in places} == {"g_1_0"}


def test_positions_are_jagged_as_verls_engines_take_them():
    rows = [torch.arange(8).reshape(4, 2), torch.arange(12).reshape(4, 3)]
    position_ids = media.jagged_positions(rows)
    assert position_ids.dim() == 3 and position_ids.values().shape == (4, 5)
    padded = torch.nested.to_padded_tensor(position_ids, padding=0, output_size=(2, 4, 3))
    assert torch.equal(padded[1], rows[1]) and torch.equal(padded[0, :, :2], rows[0])


@pytest.mark.parametrize("grid", [torch.tensor([[1, 1, 1]]), torch.tensor([1, 2, 1])])
def test_patches_whose_grids_are_of_another_kind_are_one_piece(grid):
    row = row_of(2, []) | {"multi_modal_inputs": {"pixel_values": torch.rand(2, PATCH), "image_grid_thw": grid}}
    (after,) = restored(packed([row]))
    assert_same(after, row)
