# pyright: reportAttributeAccessIssue=false
# torch's types do not know of jagged tensors.
"""Sequences of different lengths, end to end in one tensor: what a jagged column is, as arithmetic wants it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Ragged(NamedTuple):
    """One column of a batch.

    Args:
        values: shape (total length, ...), the sequences one after the other.
        lengths: shape (rows,), int64.
    """

    values: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, column: torch.Tensor) -> "Ragged":
        """A jagged column, or a dense one of shape (rows, length, ...)."""
        if column.is_nested:
            return cls(column.values(), column.offsets().diff())
        return cls(column.flatten(0, 1), torch.full((len(column),), column.shape[1]))

    @classmethod
    def join(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """The rows of `parts` one after the other."""
        return cls(torch.cat([part.values for part in parts]), torch.cat([part.lengths for part in parts]))

    @property
    def starts(self) -> torch.Tensor:
        """Where each row begins in `values`; shape (rows,)."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def places(self) -> torch.Tensor:
        """Position of each value within its row; shape (total length,)."""
        return torch.arange(len(self.values)) - self.starts.repeat_interleave(self.lengths)

    def rows(self) -> Sequence[torch.Tensor]:
        """Each by itself."""
        return self.values.split(self.lengths.tolist())

    def take(self, rows: torch.Tensor) -> "Ragged":
        """Those rows, in that order."""
        lengths = self.lengths[rows]
        taken = Ragged(torch.empty(int(lengths.sum()), 0), lengths)
        return Ragged(self.values[taken.places + self.starts[rows].repeat_interleave(lengths)], lengths)

    def followed_by(self, other: "Ragged") -> "Ragged":
        """Each row with the row of `other` behind it."""
        both = Ragged(
            torch.empty(len(self.values) + len(other.values), dtype=self.values.dtype), self.lengths + other.lengths
        )
        both.values[self.places + both.starts.repeat_interleave(self.lengths)] = self.values
        both.values[other.places + (both.starts + self.lengths).repeat_interleave(other.lengths)] = other.values
        return both

    def with_values(self, values: torch.Tensor) -> "Ragged":
        """Other values of the same lengths."""
        return Ragged(values, self.lengths)

    def nested(self) -> torch.Tensor:
        """As a jagged tensor."""
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])
        return torch.nested.nested_tensor_from_jagged(self.values, offsets)
