"""PPO's clipped surrogate with bounds of any kind, as several families use it."""

from typing import Any

from torch import Tensor


def clipped_surrogate(ratio: Tensor, advantages: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """max(-A r, -A clip(r, low, high)), and where it leaves a gradient.

    See PPO (arXiv:1707.06347).

    Args:
        ratio: r of each token, [batch, response].
        advantages: A of each token, same shape.
        low: Lower bound of r, a number or a tensor that broadcasts to `ratio`; 0 switches it off.
        high: Upper bound of r, of the same kind; inf switches it off.

    Returns:
        The value of each token, and a bool tensor: False where the clip is active, so that the gradient is 0.
    """
    keep = ~(((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low)))
    return -advantages * ratio.clamp(low, high).where(~keep, ratio), keep
