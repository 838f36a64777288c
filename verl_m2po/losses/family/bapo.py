"""The loss `bapo`: PPO with clip bounds that widen until positive tokens have their share of the loss.

See "BAPO: Balanced Policy Optimization with Adaptive Clipping" (arXiv:2510.18927) and the recipe in WooooDyy/BAPO.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.clipped import clipped_surrogate
from verl_m2po.losses.kernel.mini_batch import SCOPES
from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Decision, Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_choice, check_number
from verl_m2po.losses.kernel.tokens import Tokens

ORDERS = ("high_first", "low_first")
WEIGHTS = ("behaviour_probability", "none")


@dataclass
class BAPOConfig(BaseConfig):
    """Settings of the loss `bapo`; the released code is order low_first, weight none, positive_share 0.5, dual_clip 3.

    Args:
        positive_share: Share of the loss that tokens with A > 0 should have, in [0, 1). 0 leaves the bounds at their
            start. A ratio q of positive to negative loss, as in the released code, is the share q / (1 + q).
        order: Bound that is widened first, to its end, before the other. "high_first": the paper. "low_first": the
            released code; a higher lower bound only lowers the share, so its search always runs through it in vain.
        weight: What a token's loss is weighted with in the share. "behaviour_probability": the paper. "none": the
            released code.
        low_start: Lower bound of the ratio at first.
        low_end: Where it is not raised any further; low_start holds it fixed.
        low_step: By how much it is raised at a time.
        high_start: Upper bound of the ratio at first.
        high_end: Where it is not raised any further; high_start holds it fixed.
        high_step: By how much it is raised at a time.
        dual_clip: Upper bound of the ratio where A < 0; null: none. The released code: 3.
        scope: "mini_batch": one pair of bounds for the whole optimizer mini-batch, whatever the micro-batches and
            ranks. "micro_batch": one for each micro-batch on each rank.
    """

    positive_share: float = 0.4
    order: str = "high_first"
    weight: str = "behaviour_probability"
    low_start: float = 0.6
    low_end: float = 0.9
    low_step: float = 0.05
    high_start: float = 1.2
    high_end: float = 3.0
    high_step: float = 0.1
    dual_clip: float | None = None
    scope: str = "mini_batch"

    def __post_init__(self):
        check_number(self.positive_share, "bapo.positive_share", at_least=0, below=1)
        check_choice(self.order, ORDERS, "bapo.order")
        check_choice(self.weight, WEIGHTS, "bapo.weight")
        check_choice(self.scope, SCOPES, "bapo.scope")
        check_number(self.low_start, "bapo.low_start", at_least=0)
        check_number(self.low_end, "bapo.low_end", at_least=self.low_start)
        check_number(self.high_start, "bapo.high_start", at_least=self.low_end)
        check_number(self.high_end, "bapo.high_end", at_least=self.high_start)
        check_number(self.low_step, "bapo.low_step", above=0)
        check_number(self.high_step, "bapo.high_step", above=0)
        for name in ("low_end", "low_step", "high_end", "high_step"):
            if math.isinf(getattr(self, name)):
                raise ValueError(f"{KEY}.bapo.{name} must be finite: bounds up to there are tried one by one.")
        if self.dual_clip is not None:
            check_number(self.dual_clip, "bapo.dual_clip", above=1)

    def lows(self) -> list[float]:
        """Lower bounds in the order in which they are tried."""
        return _grid(self.low_start, self.low_end, self.low_step, f"{KEY}.bapo.low")

    def highs(self) -> list[float]:
        """Upper bounds in the order in which they are tried."""
        return _grid(self.high_start, self.high_end, self.high_step, f"{KEY}.bapo.high")


def bapo_tokens(tokens: Tokens, settings: BAPOConfig, bounds: "Bounds") -> TokenLoss:
    """max(-A r, -A clip(r, low, high)) with the first bounds that give positive tokens their share of the loss.

    "First" is in the order in which the bounds are tried (`order`). All tokens of the optimizer mini-batch decide on
    the bounds together (unless `scope` says otherwise); where no bounds give the share, both are at their ends.
    """
    ratio = tokens.importance_weight
    low, high = bounds.ratio_low.to(ratio.dtype), bounds.ratio_high.to(ratio.dtype)
    value, keep = clipped_surrogate(ratio, tokens.advantages, low, high)
    if settings.dual_clip is not None:
        is_beyond = (tokens.advantages < 0) & (ratio > settings.dual_clip)
        value = torch.where(is_beyond, -tokens.advantages * settings.dual_clip, value)
        keep = keep & ~is_beyond
    metrics = {f"actor/bapo/{name}": value for name, value in bounds._asdict().items()}
    return TokenLoss(value, -tokens.advantages * ratio, keep, metrics=metrics)


class Bounds(NamedTuple):
    """The decision, as 0-d float64 tensors.

    Args:
        ratio_low: Lower bound of the ratio.
        ratio_high: Upper bound of the ratio.
        positive_share: Share of tokens with A > 0 in the loss under these bounds.
    """

    ratio_low: Tensor
    ratio_high: Tensor
    positive_share: Tensor


class BoundsSearch:
    """The choice of bounds for tokens that arrive one micro-batch after the other."""

    def __init__(self, settings: BAPOConfig):
        self.settings = settings
        self._sums: list[Tensor] = []

    def add(self, tokens: Tokens) -> "BoundsSearch":
        """Count the tokens of a micro-batch; returns this search."""
        self._sums.append(torch.cat(loss_sums(tokens, self.settings)))
        return self

    def solve(self, group: dist.ProcessGroup | None = None) -> Bounds:
        """The bounds for all tokens added so far, on all ranks of `group` (None: this process alone)."""
        sums = torch.stack(self._sums).sum(0)
        if group is not None:
            dist.all_reduce(sums, group=group)
        highs = len(self.settings.highs())
        return choose_bounds(sums[:highs], sums[highs:], self.settings)


def loss_sums(tokens: Tokens, settings: BAPOConfig) -> tuple[Tensor, Tensor]:
    """What tokens with A > 0 contribute to the loss at each upper bound, and those with A < 0 at each lower bound.

    These are sums of absolute losses. They add up over micro-batches and ranks, so the bounds of a whole mini-batch
    need nothing else.

    Returns:
        [number of upper bounds] and [number of lower bounds], float64.
    """
    ratio = tokens.importance_weight
    weight = tokens.advantages.abs().double()
    if settings.weight == "behaviour_probability":
        weight = weight * (tokens.log_prob - tokens.log_ratio).exp()
    positive_weight = weight.where(tokens.advantages > 0, 0.0)
    negative_weight = weight.where(tokens.advantages < 0, 0.0)
    positive = [(positive_weight * ratio.clamp(max=high)).sum() for high in settings.highs()]
    negative = [(negative_weight * ratio.clamp(min=low)).sum() for low in settings.lows()]
    return torch.stack(positive), torch.stack(negative)


def choose_bounds(positive: Tensor, negative: Tensor, settings: BAPOConfig) -> Bounds:
    """The first bounds whose share reaches the target, the last ones if none does.

    No value is read back from an accelerator.

    Args:
        positive: First result of `loss_sums`, over all tokens that decide together.
        negative: Second result of `loss_sums`, over the same tokens.
        settings: Target, bounds and their order.
    """
    highs, lows = settings.highs(), settings.lows()
    if settings.order == "high_first":
        tried = [(0, i) for i in range(len(highs))] + [(j, len(highs) - 1) for j in range(1, len(lows))]
    else:
        tried = [(j, 0) for j in range(len(lows))] + [(len(lows) - 1, i) for i in range(1, len(highs))]
    low_index, high_index = torch.tensor(tried, device=positive.device).T
    whole = positive[high_index] + negative[low_index]
    # Nothing to balance counts as balanced.
    shares = torch.where(whole > 0, positive[high_index] / whole, 1.0)
    reached = shares >= settings.positive_share
    reached[-1] = True
    first = reached.to(torch.int8).argmax()
    low = positive.new_tensor(lows)[low_index[first]]
    high = positive.new_tensor(highs)[high_index[first]]
    return Bounds(low, high, shares[first])


def _grid(start: float, end: float, step: float, key: str) -> list[float]:
    """start, start + step, ..., end; `end` is always the last."""
    steps = (end - start) / step
    if steps > 1000:
        raise ValueError(f"{key}_step={step} makes more than 1000 steps from {start} to {end}: use a larger one.")
    # Rounding must not add a step of length 0.
    whole = int(steps + 1e-9)
    values = [start + i * step for i in range(whole + 1)]
    return values if values[-1] >= end - 1e-9 * max(1.0, end) else [*values, end]


register(
    Loss(
        name="bapo",
        summary="PPO with clip bounds that widen until positive tokens have their share of the loss",
        rule=bapo_tokens,
        settings=BAPOConfig,
        decision=Decision(lambda settings, _floor: BoundsSearch(settings)),
        needs=BEHAVIOUR,
        presets=("bapo", "bapo_code"),
    )
)
