"""Images, videos and positions of several axes: what the rows of a group have in common is stored once.

The tensors of a row are cut into pieces, one for each image or video. A piece lies with the first row of its group that
has it, as safetensors; a row says of which pieces it is made. An image of the prompt so is stored once for all
responses, one that a tool returned with the response that called it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch

Place = list[str]
"""Of a piece: the key of the row that it lies with, and its name there. A list, as JSON has it."""

POSITIONS = "position_ids"

_GRID_OF = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""Patches of several images end to end, and the tensor of their grids, [images, (time, height, width)]."""


class Pool:
    """The pieces that the rows of one group have stored, and where they lie."""

    def __init__(self, stored: Iterable[tuple[Place, torch.Tensor]] = ()) -> None:
        self._stored = list(stored)

    def copy(self) -> "Pool":
        """For a row that may not get stored after all."""
        return Pool(self._stored)

    def pack(self, key: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, list[Place]]]:
        """Store what of `tensors` no row has stored yet.

        Args:
            key: of the row that it is to lie with.
            tensors: of any shapes, by name.

        Returns:
            The new pieces as bytes, uint8 [bytes], none where all are known; and the pieces of each tensor.
        """
        new: dict[str, torch.Tensor] = {}
        made_of = {}
        for name, tensor in tensors.items():
            made_of[name] = [self._place(key, piece, new) for piece in _pieces(name, tensor, tensors)]
        return _bytes_of(new), made_of

    def _place(self, key: str, piece: torch.Tensor, new: dict[str, torch.Tensor]) -> Place:
        for place, stored in self._stored:
            if stored.dtype == piece.dtype and torch.equal(stored, piece):
                return place
        name = str(len(new))
        new[name] = piece.contiguous().clone()  # safetensors refuses views of one storage
        self._stored.append(([key, name], new[name]))
        return [key, name]


def unpack(
    keys: Sequence[str], stored: Sequence[torch.Tensor], made_of: Sequence[Mapping[str, Sequence[Place]]]
) -> list[dict[str, torch.Tensor]]:
    """The tensors of each row.

    Args:
        keys: of the rows, whole groups.
        stored: the bytes that lie with each.
        made_of: the pieces of its tensors.

    Returns:
        By name. Rows share the memory of what they have in common.
    """
    pieces = {
        key: safetensors.torch.load(data.numpy().tobytes()) for key, data in zip(keys, stored, strict=True) if len(data)
    }

    def whole(places: Sequence[Place]) -> torch.Tensor:
        parts = [pieces[key][name] for key, name in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return [{name: whole(places) for name, places in of_row.items()} for of_row in made_of]


def nothing() -> torch.Tensor:
    """The bytes of a row that has no piece of its own."""
    return torch.empty(0, dtype=torch.uint8)


def cut_positions(position_ids: torch.Tensor) -> torch.Tensor:
    """Positions up to where every axis only counts on, which text does: what a response of text costs nothing.

    Args:
        position_ids: int64 [axes, sequence].

    Returns:
        int32 [axes, 1 to sequence].
    """
    counts_on = (position_ids.diff(dim=1) == 1).all(dim=0)
    jumps = (~counts_on).nonzero()
    kept = int(jumps[-1]) + 2 if len(jumps) else 1
    return position_ids[:, :kept].to(torch.int32)


def extend_positions(cut: torch.Tensor, length: int) -> torch.Tensor:
    """What `cut_positions` was given, of `length` tokens."""
    more = torch.arange(1, length - cut.shape[1] + 1)
    return torch.cat([cut.to(torch.int64), cut[:, -1:].to(torch.int64) + more], dim=1)


def jagged_positions(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Positions [axes, sequence] of each row as verl's engines take them: jagged in the last dimension."""
    lengths = torch.tensor([0, *(row.shape[1] for row in rows)])
    return torch.nested.nested_tensor_from_jagged(torch.cat(list(rows), dim=1), lengths.cumsum(0), jagged_dim=2)


def _pieces(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Sequence[torch.Tensor]:
    """`tensor` image by image, where its grids say where one ends."""
    grid = tensors.get(_GRID_OF.get(name, ""))
    if grid is not None and grid.dim() == 2 and len(tensor) == int(grid.prod(1).sum()):
        return tensor.split(grid.prod(1).tolist())
    return [tensor]


def _bytes_of(pieces: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not pieces:
        return nothing()
    return torch.frombuffer(bytearray(safetensors.torch.save(dict(pieces))), dtype=torch.uint8)


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of verl's `multi_modal_inputs`, and what some processors return beside them."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in inputs.items() if name not in tensors}
