"""Exact sums of squares: fixed-point arithmetic whose result does not depend on the order of the tokens."""

import math
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

# A sum of squares is held as count, whole part and two 32-bit fractions, in units that put the threshold between 1/4
# and 1. The float64 sums of such parts are exact for up to 2^21 tokens at a time, and the int64 sums for 2^30.
COLUMNS = 4
_LOW_32_BITS = 2**32 - 1
# Squares are clamped here before they are summed. It changes no decision: one alone exceeds the budget of 2^30 tokens.
_LARGEST_SQUARE = 2.0**30


class FixedPoint:
    """Fixed-point arithmetic on squares, in units that put the threshold between 1/4 and 1.

    Sums of integers do not depend on the order of their terms. A square is rounded up to a multiple of 2^-64 of a unit,
    which for float32 log ratios changes only squares below 2^-17 of the threshold. "Number" below is a |log r|.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        exponent = math.frexp(threshold)[1] if 0 < threshold < math.inf else 0
        half_exponent = (exponent + 1) // 2
        self.scale = 2.0**-half_exponent
        unit = Fraction(2) ** (2 * half_exponent)
        self.fixed_point = int(Fraction(threshold) / unit * 2**64) if threshold < math.inf else 0

    def squares(self, magnitude: Tensor) -> Iterator[Tensor]:
        """Yield, for each number: 1 if it is not 0, the whole part of its square, the next 32 bits, the 32 after those.

        Each of the four is a floating point tensor of the same shape that holds whole numbers. It is valid until the
        next one is asked for.
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
        """int64 [4]: the sums over up to 2^21 numbers of each of their `squares`."""
        return torch.stack([column.sum(dtype=torch.float64) for column in self.squares(magnitude)]).to(torch.int64)

    def sums_within(self, magnitude: Tensor) -> Tensor:
        """As `sums`, for numbers whose squares are at most the threshold, so below one unit: two thirds of the work."""
        if self.threshold == math.inf:
            return self.sums(magnitude)
        rest = magnitude.to(torch.float64, copy=True).mul_(self.scale * 2.0**16).square_()
        high = rest.floor().sum()
        low = rest.frac_().mul_(2.0**32).ceil_().sum()
        # Up to 2^21 numbers that are 0 or 1 add up exactly in float32, which takes a third of the time.
        sums = [torch.sign(magnitude).sum().double(), rest.new_zeros(()), high, low]
        return torch.stack(sums).to(torch.int64)

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
        """About how many of `ascending` fit into the budget that the sums `spent` leave; rounded sums, for a CPU."""
        threshold = self.fixed_point / 2**64
        count, whole, high, low = spent.tolist()
        running = ascending.to(torch.float64, copy=True).mul_(self.scale).square_().sub_(threshold).cumsum(0)
        budget = count * threshold - whole - high / 2**32 - low / 2**64
        return int(torch.searchsorted(running, budget, right=True))


# With `subtract_mismatch_floor` the threshold is another one whenever the floor was measured anew.
fixed_point = lru_cache(maxsize=16)(FixedPoint)


@lru_cache(maxsize=16)
def largest_root(threshold: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` whose exact square is at most `threshold`."""
    if threshold == math.inf:
        return math.inf
    largest = torch.finfo(dtype).max
    root = torch.tensor(min(math.sqrt(threshold), largest), dtype=dtype)
    if root >= largest:
        return largest
    up, down = torch.tensor(math.inf, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    while Fraction(root.item()) ** 2 > Fraction(threshold):
        root = torch.nextafter(root, down)
    while Fraction(torch.nextafter(root, up).item()) ** 2 <= Fraction(threshold):
        root = torch.nextafter(root, up)
    return root.item()
