"""The search of Algorithm 1 over the tokens of many micro-batches and ranks.

Of the trust-region tokens sorted by |log r| the algorithm keeps the longest prefix whose mean square is at most the
threshold, so the whole decision is one number: a threshold on |log r|. It is found by radix selection over the bits of
|log r|, with integer sums: no sort, no loop over tokens, no order in which the tokens have to be added, and a constant
amount of communication between ranks. Only tokens with (log r)^2 above the threshold can be dropped, so only they are
searched. A single process on a CPU, which has those few at hand, sorts them instead; the result is the same.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from verl_m2po.second_moment.fixed_point import COLUMNS, fixed_point, largest_root

# |log r| as a non-negative float sorts like its bit pattern. Digits of that pattern, from the top: (shift, bits).
_DIGITS = {
    torch.float32: ((20, 11), (9, 11), (0, 9)),
    torch.float64: ((52, 11), (41, 11), (30, 11), (19, 11), (8, 11), (0, 8)),
}
_BIT_PATTERN = {torch.float32: torch.int32, torch.float64: torch.int64}


class TrustRegion(NamedTuple):
    """The decision of Algorithm 1, as 0-d tensors on the device of the tokens, in their dtype (at least float32).

    Args:
        threshold_log_ratio: Trust-region tokens with |log r| above it are dropped; inf where none is
            dropped. It lies midway between `largest_kept` and `first_dropped`, so that a later forward pass that
            differs in the last bits decides the same.
        largest_kept: The largest |log r| of a kept trust-region token; 0 where there is none.
        first_dropped: The smallest |log r| of a dropped trust-region token; inf where there is none.
    """

    threshold_log_ratio: Tensor
    largest_kept: Tensor
    first_dropped: Tensor


def find_trust_region(
    magnitudes: Sequence[Tensor], threshold: float, group: dist.ProcessGroup | None = None
) -> TrustRegion:
    """The decision of Algorithm 1 over the tokens of all `magnitudes` of all ranks of `group`.

    Nothing is read back to the host where the tokens are on an accelerator.

    Args:
        magnitudes: One tensor per micro-batch, as `trust_region_magnitude` gives them.
        threshold: Largest allowed mean of (log r)^2 over the kept trust-region tokens; inf drops none, 0 drops all.
        group: Ranks that decide together, each of which must call this. None: this process alone.

    Returns:
        TrustRegion, the same on every rank, for any order and split of the tokens.
    """
    search = TrustRegionSearch(threshold)
    for magnitude in magnitudes:
        search.add(magnitude)
    return search.solve(group)


class TrustRegionSearch:
    """`find_trust_region` for tokens that arrive one micro-batch after the other.

    Args:
        threshold: Largest allowed mean of (log r)^2 over the kept trust-region tokens; inf drops none, 0 drops all.
    """

    def __init__(self, threshold: float):
        check_threshold(threshold)
        self.threshold = threshold
        self.units = fixed_point(threshold)
        self._inside: list[Tensor] = []
        self._largest_inside: list[Tensor] = []
        self._outside: list[Tensor] = []

    def add(self, magnitude: Tensor) -> None:
        """Count the tokens of one micro-batch: |log r| on trust-region tokens, 0 elsewhere, float32 or float64."""
        limit = largest_root(self.threshold, magnitude.dtype)
        for chunk in magnitude.flatten().split(chunk_size(magnitude)):
            inside = torch.le(chunk, limit, out=torch.empty_like(chunk)).mul_(chunk)
            self._inside.append(self.units.sums_within(inside))
            self._largest_inside.append(inside.amax() if chunk.numel() else inside.new_zeros(()))
            # Only these can ever be dropped. To select them would stall an accelerator; there they keep their place.
            self._outside.append(_select_above(chunk, limit) if on_host(chunk) else chunk - inside)

    def solve(self, group: dist.ProcessGroup | None = None) -> TrustRegion:
        """The decision over all tokens added so far, on all ranks of `group` (None: this process alone)."""
        if not self._inside:
            raise ValueError("No micro-batch was added, so there is no trust region to find.")
        spent = torch.stack(self._inside).sum(0)
        largest_kept = torch.stack(self._largest_inside).amax()
        alone = group is None or dist.get_world_size(group) == 1
        if alone and on_host(spent):
            first_dropped, largest_kept = self._solve_by_sorting(spent, largest_kept)
        else:
            first_dropped = self._first_dropped(spent, group)
            for outside in self._outside:
                if outside.numel():
                    kept = outside.masked_fill(outside >= first_dropped, 0.0)
                    largest_kept = torch.maximum(largest_kept, kept.amax())
            if group is not None:
                dist.all_reduce(largest_kept, op=dist.ReduceOp.MAX, group=group)
        middle = largest_kept + (first_dropped - largest_kept) / 2
        # Between neighbouring floats there is no middle. That of a number and inf is inf.
        separates = (middle < first_dropped) | torch.isinf(first_dropped)
        return TrustRegion(torch.where(separates, middle, largest_kept), largest_kept, first_dropped)

    def _first_dropped(self, spent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """The smallest |log r| whose tokens, together with all smaller ones, exceed the budget; inf if none does."""
        dtype = self._outside[0].dtype
        prefix = torch.zeros((), dtype=torch.int64, device=spent.device)
        over = torch.zeros((), dtype=torch.bool, device=spent.device)
        chunks = [torch.cat(self._outside)] if on_host(spent) else self._outside
        for level, (shift, bits) in enumerate(_DIGITS[dtype]):
            histogram = self._histogram(chunks, shift, bits, prefix)
            if level == 0:
                # The tokens that are always kept travel with the first histogram.
                histogram = torch.cat((spent.unsqueeze(0), histogram))
            if group is not None:
                dist.all_reduce(histogram, op=dist.ReduceOp.SUM, group=group)
            if level == 0:
                spent, histogram = histogram[0], histogram[1:]
            running = torch.cat((spent.unsqueeze(0), spent + histogram.cumsum(0)))
            exceeds = self.units.exceeds(running[1:])
            bucket = (~exceeds).sum().clamp(max=2**bits - 1)
            spent = running.index_select(0, bucket.unsqueeze(0)).squeeze(0)
            prefix = (prefix << bits) | bucket
            if level == 0:
                over = exceeds[-1]
            if on_host(spent):
                if not bool(over):
                    break
                # The few that the next digits tell apart. An accelerator would wait for the size of a selection.
                chunks = [chunk[(chunk.view(_BIT_PATTERN[dtype]) >> shift) == prefix] for chunk in chunks]
        pattern = prefix.to(_BIT_PATTERN[dtype]).view(dtype)
        return torch.where(over, pattern, torch.inf)

    def _histogram(self, chunks: Sequence[Tensor], shift: int, bits: int, prefix: Tensor) -> Tensor:
        """Counts and sums of squares of the droppable tokens under `prefix`, by the next digit of |log r|."""
        histogram = torch.zeros(2**bits, COLUMNS, dtype=torch.int64, device=prefix.device)
        for chunk in chunks:
            key = chunk.view(_BIT_PATTERN[chunk.dtype]).to(torch.int64)
            counted = ((key >> (shift + bits)) == prefix) & (chunk > 0)
            # Tokens that do not count add nothing. They are spread out, since one bucket for all would be a bottleneck.
            anywhere = torch.arange(chunk.numel(), device=chunk.device)
            bucket = torch.where(counted, key >> shift, anywhere) & (2**bits - 1)
            histogram.index_add_(0, bucket, self.units.columns(torch.where(counted, chunk, 0.0)))
        return histogram

    def _solve_by_sorting(self, spent: Tensor, largest_kept: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest dropped and the largest kept |log r|, for a CPU alone, which has the candidates at hand.

        Beside the radix selection because it takes a third of its time (python -m benchmarks.selection), which is a
        tenth of that of the whole loss.
        """
        # NumPy sorts numbers without keeping track of where they were, tens of times as fast as torch.
        outside = torch.from_numpy(np.sort(torch.cat(self._outside).numpy()))
        first = self._first_over(spent, outside)
        if first == outside.numel():
            return outside.new_tensor(torch.inf), outside[-1] if first else largest_kept
        # Tokens before it with the same |log r| go with it.
        kept = int(torch.searchsorted(outside, outside[first]))
        return outside[first], outside[kept - 1] if kept else largest_kept

    def _first_over(self, spent: Tensor, ascending: Tensor) -> int:
        """How many of `ascending`, all above the threshold, fit into the budget that is left after `spent`."""
        # Rounded sums say where to look; exact ones of all that precede it, and one by one around it, decide.
        guess, width = self.units.guess_first_over(spent, ascending), 32
        while True:
            start, stop = max(0, guess - width), min(ascending.numel(), guess + width)
            parts = [self.units.sums(part) for part in ascending[:start].split(chunk_size(ascending))]
            before = torch.stack([spent, *parts]).sum(0, keepdim=True)
            around = torch.cat((before, self.units.columns(ascending[start:stop]))).cumsum(0)
            exceeds = self.units.exceeds(around)
            # Once the sum exceeds the budget it does so for good.
            if (start == 0 or not exceeds[0]) and (stop == ascending.numel() or exceeds[-1]):
                return start + int(torch.count_nonzero(~exceeds[1:]))
            width *= 32


def _select_above(magnitude: Tensor, limit: float) -> Tensor:
    """The numbers above `limit`, on the CPU; NumPy selects several times as fast as torch."""
    numbers = magnitude.numpy()
    return torch.from_numpy(numbers.compress(numbers > limit))


def on_host(tensor: Tensor) -> bool:
    """Whether values of `tensor` can be looked at without stalling an accelerator."""
    return tensor.device.type == "cpu"


def chunk_size(tensor: Tensor) -> int:
    """Tokens to work on at once: few enough for a CPU's cache, and for small temporaries on an accelerator."""
    return 2**16 if on_host(tensor) else 2**20


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise unless `threshold` is a non-negative number; `name` is its name in the error."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"{name} must be a number, got {threshold!r} ({type(threshold).__name__}).")
    if math.isnan(threshold) or threshold < 0:
        raise ValueError(f"{name} must be at least 0 (the paper uses 0.04), got {threshold}.")
