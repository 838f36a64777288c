"""The loss `m2po`: Algorithm 1 of M2PO (arXiv:2510.01161); its mask on other weights as an option."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from omegaconf import DictConfig
from verl.base_config import BaseConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import read
from verl_m2po.losses.kernel.mini_batch import SCOPES
from verl_m2po.losses.kernel.needs import BEHAVIOUR, MODE, VERL_MODES
from verl_m2po.losses.kernel.record import Decision, Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import KEY, check_boolean, check_choice, check_positive_threshold
from verl_m2po.losses.kernel.tokens import Tokens, at_most, tapered
from verl_m2po.second_moment import TrustRegion, TrustRegionSearch

WEIGHTS = ("ratio", "tapered")
MISMATCH_FLOOR = f"{KEY}.m2po.subtract_mismatch_floor"


@dataclass
class M2POConfig(BaseConfig):
    """Settings of the loss `m2po`.

    Args:
        threshold: Largest mean of (log r)^2 over the kept trust-region tokens. The paper uses 0.04 throughout. inf
            switches the trust region off.
        scope: "mini_batch": one decision for the whole optimizer mini-batch, whatever the micro-batches and ranks.
            "micro_batch": one for each micro-batch on each rank, as other implementations do.
        subtract_mismatch_floor: Count only what exceeds the second moment of tokens whose age is zero, which is due to
            the inference engine and not to staleness. Needs scope mini_batch, and a staleness mode of this package,
            which knows the ages. false subtracts nothing.
        weight: What a kept token counts. "ratio": its importance ratio, as in the paper. "tapered": as in TOPR
            (arXiv:2503.14286), 1 where A > 0, elsewhere the importance ratio of its response, at most 1.
    """

    threshold: float = 0.04
    scope: str = "mini_batch"
    subtract_mismatch_floor: bool = False
    weight: str = "ratio"

    def __post_init__(self):
        check_positive_threshold(self.threshold, f"{KEY}.m2po.threshold")
        check_choice(self.scope, SCOPES, "m2po.scope")
        check_choice(self.weight, WEIGHTS, "m2po.weight")
        check_boolean(self.subtract_mismatch_floor, "m2po.subtract_mismatch_floor")
        if self.subtract_mismatch_floor and self.scope != "mini_batch":
            raise ValueError(
                f"{MISMATCH_FLOOR}=true needs {KEY}.m2po.scope=mini_batch: "
                "the age of a token is not known inside a micro-batch."
            )


def m2po_tokens(tokens: Tokens, settings: M2POConfig, region: TrustRegion) -> TokenLoss:
    """-A r on the tokens that Algorithm 1 keeps, averaged over all response tokens; nothing is clipped.

    With tapered weights w in the place of r: -A w log pi, w without gradient.
    """
    keep = at_most(tokens.magnitude, region.threshold_log_ratio)
    if settings.weight == "tapered":
        weighted = -tapered(tokens.advantages, tokens.sequence_log_ratio()) * tokens.advantages
        return TokenLoss((weighted * tokens.log_prob).where(keep, 0.0), weighted, keep, region=region)
    value = (tokens.advantages * tokens.importance_weight).neg_()
    return TokenLoss(value, value, keep, region=region)


class _Search:
    def __init__(self, settings: M2POConfig, mismatch_floor: float):
        self._search = TrustRegionSearch(settings.threshold + mismatch_floor)

    def add(self, tokens: Tokens) -> None:
        self._search.add(tokens.magnitude)

    def solve(self, group: dist.ProcessGroup | None = None) -> TrustRegion:
        return self._search.solve(group)


def _problems(config: DictConfig) -> Iterator[Problem]:
    threshold = read(config, f"{KEY}.m2po.threshold")
    if threshold == math.inf:
        yield Problem(
            f"{KEY}.m2po.threshold",
            threshold,
            "an infinite threshold masks nothing; a number too large for a float, as 1e400, is one too",
            "Set algorithm.policy_loss=no_trust_region if that is meant, or the paper's 0.04",
            is_fatal=False,
        )
    mode = read(config, MODE)
    if read(config, MISMATCH_FLOOR) and mode in VERL_MODES:
        yield Problem(
            MISMATCH_FLOOR,
            True,
            f"the floor is measured on tokens of age zero, and {MODE}={mode} gives no ages",
            f"Set it to false, or {MODE} to stale_k, stale_k_separate or bounded_async",
        )


register(
    Loss(
        name="m2po",
        summary="Mask the tokens with the largest (log r)^2 until the mean of the rest is within the threshold",
        rule=m2po_tokens,
        settings=M2POConfig,
        decision=Decision(_Search, lambda settings: settings.subtract_mismatch_floor),
        needs=BEHAVIOUR,
        problems=_problems,
        presets=("m2po", "m2po_tapered"),
        masks_sequences_first=True,
    )
)
