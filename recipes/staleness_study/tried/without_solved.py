"""M2PO without the groups that the present policy has solved since they were generated."""

import torch
from torch import Tensor

from staleness_study.tried._groups import Tried, advantage_of_responses, present_share
from staleness_study.tried._masked import masked
from verl_m2po.losses.kernel.record import TokenLoss
from verl_m2po.losses.kernel.tokens import Tokens, at_most
from verl_m2po.second_moment import TrustRegion

# Estimated share of successes under the present policy from which on a prompt counts as solved
SOLVED = 0.9


def unsolved(tokens: Tokens, settings: Tried) -> Tensor:
    """bool [rows, 1]: rows of prompts that the present policy gets wrong often enough."""
    succeeded = (advantage_of_responses(tokens, settings.responses) > 0).to(tokens.log_ratio.dtype)
    share = (present_share(tokens, settings.responses) * succeeded).sum(-1, keepdim=True)
    return (share < SOLVED).expand_as(succeeded).reshape(-1, 1)


def _magnitude(tokens: Tokens, settings: Tried) -> Tensor:
    return torch.where(unsolved(tokens, settings), tokens.magnitude, 0.0)


def without_solved_tokens(tokens: Tokens, settings: Tried, region: TrustRegion) -> TokenLoss:
    """-A r on the tokens that Algorithm 1 keeps of the prompts that are not solved."""
    value = (tokens.advantages * tokens.importance_weight).neg_()
    keep = at_most(tokens.magnitude, region.threshold_log_ratio) & unsolved(tokens, settings)
    return TokenLoss(value, value, keep, region=region)


LOSS = masked(without_solved_tokens, "M2PO without prompts that the present policy has solved", _magnitude)
