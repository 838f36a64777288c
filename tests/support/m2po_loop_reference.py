"""Algorithm 1 of M2PO (arXiv:2510.01161) as the paper writes it: a loop over tokens, in exact arithmetic."""

import math
from fractions import Fraction


def loop_keep_mask(log_ratio, advantages, response_mask, threshold):
    """Keep mask by the paper's loop, over flat lists of numbers.

    The paper's argmax picks one of several equal tokens. The contract says that these go together, so a whole class of
    equal |log r| is removed at a time.
    """
    finite = [math.isfinite(d) for d in log_ratio]
    keep = [bool(m) and f for m, f in zip(response_mask, finite, strict=True)]
    squares = {
        i: Fraction(d) ** 2
        for i, (d, a) in enumerate(zip(log_ratio, advantages, strict=True))
        if keep[i] and ((a > 0 and d > 0) or (a < 0 and d < 0))
    }
    if threshold == math.inf:
        return keep
    while squares and sum(squares.values()) > Fraction(threshold) * len(squares):
        largest = max(squares.values())
        for i in [i for i, square in squares.items() if square == largest]:
            keep[i] = False
            del squares[i]
    return keep
