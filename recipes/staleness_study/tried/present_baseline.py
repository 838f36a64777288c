"""M2PO with the baseline of a group under the present policy: the importance-weighted mean of its rewards.

The mean of the rewards as they were sampled is the baseline of the policy that sampled them. Where the present policy
succeeds more often, every success counts for too much and every failure for too little.
"""

import dataclasses

from torch import Tensor

from staleness_study.tried._groups import Tried, advantage_of_responses, present_share
from staleness_study.tried._masked import masked
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens, at_most
from verl_m2po.second_moment import TrustRegion


def rebased(tokens: Tokens, settings: Tried) -> Tokens:
    """`tokens` with their advantages over the mean under the present policy."""
    advantages = advantage_of_responses(tokens, settings.responses)
    mean = (present_share(tokens, settings.responses) * advantages).sum(-1, keepdim=True)
    return dataclasses.replace(tokens, raw_advantages=tokens.advantages - mean.expand_as(advantages).reshape(-1, 1))


def _magnitude(tokens: Tokens, settings: Tried) -> Tensor:
    return rebased(tokens, settings).magnitude


def present_baseline_tokens(tokens: Tokens, settings: Tried, region: TrustRegion) -> TokenLoss:
    """-A' r on the tokens that Algorithm 1 keeps, with A' over the mean under the present policy."""
    seen = rebased(tokens, settings)
    value = (seen.advantages * seen.importance_weight).neg_()
    return TokenLoss(value, value, at_most(seen.magnitude, region.threshold_log_ratio), region=region)


LOSS = masked(present_baseline_tokens, "M2PO with the group's baseline under the present policy", _magnitude)
