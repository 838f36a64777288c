"""The responses to a prompt, under the present policy."""

from dataclasses import dataclass

import torch
from torch import Tensor
from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.settings import check_number, check_positive_threshold
from verl_m2po.losses.kernel.tokens import Tokens

# e^3: a response that the present policy says 20 times as often counts as 20.
LARGEST_LOG_WEIGHT = 3.0


@dataclass
class Tried(BaseConfig):
    """Settings of every loss here.

    Args:
        threshold: M2PO's.
        responses: Of a prompt, as `actor_rollout_ref.rollout.n`.
        scope: Tokens that decide together; one of `mini_batch.SCOPES`.
    """

    threshold: float = 0.04
    responses: int = 8
    scope: str = "mini_batch"

    def __post_init__(self):
        check_positive_threshold(self.threshold, "tried.threshold")
        check_number(self.responses, "tried.responses", at_least=1)


def advantage_of_responses(tokens: Tokens, responses: int) -> Tensor:
    """[prompts, responses]: the advantage that all tokens of a response share."""
    means = (tokens.advantages * tokens.counted).sum(-1) / tokens.counted.sum(-1).clamp(min=1)
    return means.view(-1, responses)


def present_share(tokens: Tokens, responses: int) -> Tensor:
    """[prompts, responses]: weight of each response in a mean under the present policy, from those of the old one.

    Importance weights of whole responses, truncated and normalised within a prompt.
    """
    log_weight = tokens.log_ratio.sum(-1).clamp(max=LARGEST_LOG_WEIGHT).view(-1, responses)
    return torch.softmax(log_weight, dim=-1)
