"""Algorithm 1 of M2PO in pure torch: which tokens keep their gradient.

See "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data on LLMs?" (arXiv:2510.01161).

The paper removes the token with the largest (log r)^2 from the trust-region tokens until the mean of the rest is at
most the threshold. Sorted by |log r|, that keeps the longest prefix whose mean is at most the threshold, so the whole
decision is one number: a threshold on |log r|. It is found here by radix selection over the bits of |log r|, with
integer sums: no sort, no loop over tokens, no order in which the tokens have to be added, and a constant amount of
communication between ranks. Only tokens with (log r)^2 above the threshold can be dropped, so only they are searched.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# |log r| as a non-negative float sorts like its bit pattern. Digits of that pattern, from the top: (shift, bits).
_DIGITS = {
    torch.float32: ((20, 11), (9, 11), (0, 9)),
    torch.float64: ((52, 11), (41, 11), (30, 11), (19, 11), (8, 11), (0, 8)),
}
_BIT_PATTERN = {torch.float32: torch.int32, torch.float64: torch.int64}
# A sum of squares is held as count, whole part and two 32-bit fractions, in units that put the threshold between 1/4
# and 1. The float64 sums of such parts are exact for up to 2^21 tokens at a time, and the int64 sums for 2^30.
_COLUMNS = 4
_LOW_32_BITS = 2**32 - 1
# Squares are clamped here before they are summed. It changes no decision: one alone exceeds the budget of 2^30 tokens.
_LARGEST_SQUARE = 2.0**30


class TrustRegion(NamedTuple):
    """The decision of Algorithm 1, as 0-d tensors on the device of the tokens, in their dtype (at least float32).

    Args:
        threshold_log_ratio: Trust-region tokens with |log r| above it are dropped; inf where none is. It lies midway
            between the two tokens that it separates, so that a later forward pass that differs in the last bits
            decides the same.
        largest_kept: The largest |log r| of a kept trust-region token; 0 where there is none.
        first_dropped: The smallest |log r| of a dropped trust-region token; inf where there is none.
    """

    threshold_log_ratio: Tensor
    largest_kept: Tensor
    first_dropped: Tensor


def keep_mask(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor, threshold: float) -> Tensor:
    """Which response tokens keep their gradient under Algorithm 1 of M2PO (arXiv:2510.01161).

    Args:
        log_ratio: log of current over behaviour policy, any shape, floating point, detached. Non-finite values are
            dropped and never influence what happens to the others.
        advantages: Same shape and dtype. Tokens with advantage 0 are outside the trust region, so they are kept.
        response_mask: Same shape, bool or 0/1. Tokens outside it are never kept and never counted.
        threshold: Largest allowed mean of (log r)^2 over the kept trust-region tokens. inf keeps every response
            token; 0 drops every trust-region token.

    Returns:
        bool, same shape: True where a response token is kept. Equal |log r| at the boundary stay or go together.

    Raises:
        ValueError: An argument does not fit, or the response mask is empty. The last is not looked for on an
            accelerator, where looking would stall it.
        TypeError: An argument has the wrong type.
    """
    check_tokens("log_ratio", log_ratio, advantages=advantages, response_mask=response_mask)
    if advantages.dtype != log_ratio.dtype:
        raise TypeError(f"advantages has dtype {advantages.dtype}, but log_ratio has {log_ratio.dtype}.")
    check_threshold(threshold)
    if on_host(response_mask) and not bool(response_mask.any()):
        raise ValueError("response_mask selects no token, so there is nothing to take the second moment of.")
    magnitude = trust_region_magnitude(log_ratio, advantages, response_mask)
    region = find_trust_region([magnitude], threshold)
    return response_mask.bool() & torch.isfinite(log_ratio) & (magnitude <= region.threshold_log_ratio)


def trust_region_magnitude(log_ratio: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """|log r| on trust-region tokens (A > 0 and r > 1, or A < 0 and r < 1), 0 on all others.

    Args:
        log_ratio: log of current over behaviour policy, any shape. Non-finite values count as outside.
        advantages: Same shape.
        response_mask: Same shape, bool or 0/1.

    Returns:
        Same shape; float32, or float64 where `log_ratio` is. A new tensor.
    """
    dtype = torch.float64 if log_ratio.dtype == torch.float64 else torch.float32
    # sign(A) * log r is positive exactly on the trust region; a product A * log r could underflow to 0.
    magnitude = torch.sign(advantages).to(dtype).mul_(log_ratio).relu_().mul_(response_mask)
    return magnitude.nan_to_num_(nan=0.0, posinf=0.0)


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
        self.units = _units(threshold)
        self._inside: list[Tensor] = []
        self._largest_inside: list[Tensor] = []
        self._outside: list[Tensor] = []

    def add(self, magnitude: Tensor) -> None:
        """Count the tokens of one micro-batch: |log r| on trust-region tokens, 0 elsewhere, float32 or float64."""
        limit = largest_root(self.threshold, magnitude.dtype)
        for chunk in magnitude.flatten().split(chunk_size(magnitude)):
            inside = torch.le(chunk, limit, out=torch.empty_like(chunk)).mul_(chunk)
            self._inside.append(self.units.sums(inside))
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
        for level, (shift, bits) in enumerate(_DIGITS[dtype]):
            histogram = self._histogram(self._outside, shift, bits, prefix)
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
            if level == 0 and on_host(over) and not bool(over):
                break
        pattern = prefix.to(_BIT_PATTERN[dtype]).view(dtype)
        return torch.where(over, pattern, torch.inf)

    def _histogram(self, chunks: Sequence[Tensor], shift: int, bits: int, prefix: Tensor) -> Tensor:
        """Counts and sums of squares of the droppable tokens under `prefix`, by the next digit of |log r|."""
        histogram = torch.zeros(2**bits, _COLUMNS, dtype=torch.int64, device=prefix.device)
        for chunk in chunks:
            key = chunk.view(_BIT_PATTERN[chunk.dtype]).to(torch.int64)
            counted = ((key >> (shift + bits)) == prefix) & (chunk > 0)
            # Tokens that do not count add nothing. They are spread out, since one bucket for all would be a bottleneck.
            anywhere = torch.arange(chunk.numel(), device=chunk.device)
            bucket = torch.where(counted, key >> shift, anywhere) & (2**bits - 1)
            histogram.index_add_(0, bucket, self.units.columns(torch.where(counted, chunk, 0.0)))
        return histogram

    def _solve_by_sorting(self, spent: Tensor, largest_kept: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest dropped and the largest kept |log r|, for a CPU alone, which has the candidates at hand."""
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


class _Units:
    """Fixed-point arithmetic on squares, in units that put the threshold between 1/4 and 1.

    Sums of integers do not depend on their order. A square is exact down to 2^-64 of a unit and rounded up there, which
    for float32 log ratios concerns only tokens whose square is below 2^-17 of the threshold.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        exponent = math.frexp(threshold)[1] if 0 < threshold < math.inf else 0
        half_exponent = (exponent + 1) // 2
        self.scale = 2.0**-half_exponent
        unit = Fraction(2) ** (2 * half_exponent)
        self.fixed_point = int(Fraction(threshold) / unit * 2**64) if threshold < math.inf else 0

    def squares(self, magnitude: Tensor) -> Iterator[Tensor]:
        """Of each number: is not 0, whole part of the square, its next 32 bits, the 32 after those.

        Floating point, same shape, without a fraction. Each is valid until the next one is asked for.
        """
        yield torch.sign(magnitude)
        rest = magnitude.to(torch.float64, copy=True).mul_(self.scale).square_().clamp_(max=_LARGEST_SQUARE)
        digits = rest.floor()
        yield digits
        rest.sub_(digits).mul_(2.0**32)
        yield torch.floor(rest, out=digits)
        yield rest.sub_(digits).mul_(2.0**32).ceil_()

    def columns(self, magnitude: Tensor) -> Tensor:
        """int64 [tokens, 4]: the `squares` of each number."""
        return torch.stack([column.to(torch.int64) for column in self.squares(magnitude)], -1)

    def sums(self, magnitude: Tensor) -> Tensor:
        """int64 [4]: the sums of `squares` of up to 2^21 numbers."""
        return torch.stack([column.sum(dtype=torch.float64) for column in self.squares(magnitude)]).to(torch.int64)

    def exceeds(self, sums: Tensor) -> Tensor:
        """Whether the mean square of each row of [..., 4] sums is above the threshold."""
        if self.threshold == math.inf:
            return torch.zeros_like(sums[..., 0], dtype=torch.bool)
        count, whole, high, low = sums.unbind(-1)
        low = low - count * (self.fixed_point & _LOW_32_BITS)
        high = high - count * (self.fixed_point >> 32) + (low >> 32)
        whole = whole + (high >> 32)
        fraction = (high & _LOW_32_BITS) | (low & _LOW_32_BITS)
        return (whole > 0) | ((whole == 0) & (fraction > 0))

    def guess_first_over(self, spent: Tensor, ascending: Tensor) -> int:
        """How many of `ascending` fit into the budget after the sums `spent`, by rounded sums; for a CPU."""
        threshold = self.fixed_point / 2**64
        count, whole, high, low = spent.tolist()
        running = ascending.to(torch.float64, copy=True).mul_(self.scale).square_().sub_(threshold).cumsum(0)
        budget = count * threshold - whole - high / 2**32 - low / 2**64
        return int(torch.searchsorted(running, budget, right=True))


# With `subtract_mismatch_floor` the threshold is another one whenever the floor was measured anew.
_units = lru_cache(maxsize=16)(_Units)


@lru_cache(maxsize=16)
def largest_root(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` whose exact square is at most `threshold`."""
    if threshold == math.inf:
        return math.inf
    root = torch.tensor(math.sqrt(threshold), dtype=dtype)
    up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    while Fraction(root.item()) ** 2 > Fraction(threshold):
        root = torch.nextafter(root, down)
    while Fraction(torch.nextafter(root, up).item()) ** 2 <= Fraction(threshold):
        root = torch.nextafter(root, up)
    return root.item()


def on_host(tensor: Tensor) -> bool:
    """Whether values of `tensor` can be looked at without stalling an accelerator."""
    return tensor.device.type == "cpu"


def chunk_size(tensor: Tensor) -> int:
    """Tokens to work on at once: few enough for the cache of a CPU, and for small temporaries on an accelerator."""
    return 2**16 if on_host(tensor) else 2**20


def check_threshold(threshold: float, name: str = "threshold") -> None:
    """Raise unless `threshold` is a non-negative number; `name` is what the error calls it."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise TypeError(f"{name} must be a number, got {threshold!r} ({type(threshold).__name__}).")
    if math.isnan(threshold) or threshold < 0:
        raise ValueError(f"{name} must be at least 0 (the paper uses 0.04), got {threshold}.")


def check_tokens(name: str, reference: Tensor, **others: Tensor) -> None:
    """Raise unless all describe the same tokens; looks at no value, so an accelerator is not stalled.

    Args:
        name: What an error calls `reference`.
        reference: Floating point, detached.
        others: By name; same shape and device, detached.
    """
    for other_name, tensor in {name: reference, **others}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other_name} must be a tensor, got {type(tensor).__name__}.")
        if tensor.requires_grad:
            raise ValueError(f"{other_name} requires grad, but nothing is differentiated by it: pass it detached.")
        if tensor.shape != reference.shape:
            raise ValueError(f"{other_name} has shape {tuple(tensor.shape)}, but {name} has {tuple(reference.shape)}.")
        if tensor.device != reference.device:
            raise ValueError(f"{other_name} is on {tensor.device}, but {name} is on {reference.device}.")
        if tensor.is_complex():
            raise TypeError(f"{other_name} must be real, got {tensor.dtype}.")
    if not reference.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {reference.dtype}.")
