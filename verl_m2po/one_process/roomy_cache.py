"""A key-value cache with room for the tokens to come: transformers' dynamic one copies all of it for every token."""

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class _RoomyLayer(DynamicLayer):
    """What `DynamicLayer` holds, at the beginning of tensors that are large enough from the start."""

    def __init__(self, filled: DynamicLayer, more: int) -> None:
        super().__init__()
        assert filled.keys is not None and filled.values is not None
        self.lazy_initialization(filled.keys, filled.values)
        self._all_keys, self._all_values = _with_room(filled.keys, more), _with_room(filled.values, more)
        self._hold(filled.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next tokens behind those that are there; returns all up to and with them."""
        begin = self.get_seq_length()
        end = begin + key_states.shape[-2]
        self._all_keys[..., begin:end, :] = key_states
        self._all_values[..., begin:end, :] = value_states
        return self._hold(end)

    def _hold(self, tokens: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._all_keys[..., :tokens, :], self._all_values[..., :tokens, :]
        return self.keys, self.values


def with_room(cache: Cache, more: int) -> Cache:
    """A cache with the content of `cache` and room for `more` tokens, for generation without gradient.

    Args:
        cache: As a forward pass of transformers fills it.
        more: Tokens; with one more, writing raises an error.
    """
    layers = [_RoomyLayer(layer, more) for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(cache.layers), "a model with another kind of attention"
    return Cache(layers=layers)  # pyright: ignore[reportArgumentType]  # it takes a list of any layers


def _with_room(filled: Tensor, more: int) -> Tensor:
    *outer, tokens, width = filled.shape
    whole = filled.new_empty((*outer, tokens + more, width))
    whole[..., :tokens, :] = filled
    return whole
