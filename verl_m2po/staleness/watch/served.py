"""Does the rollout serve what the trainer has? Asked once, about the first weights that were trained and then pushed.

The weights travel through another process's loader under other names. Where they get lost on the way, for example
because only a frozen base is sent (verl issue 7495), nothing fails: the rollout answers with old weights for ever, and
every age that is reported is wrong.
"""

from dataclasses import dataclass

import torch


class RolloutServesOtherWeights(RuntimeError):
    """The rollout gives other probabilities than the trainer to the same tokens."""


@dataclass(frozen=True)
class Scores:
    """Log-probs of the same tokens by both sides.

    Args:
        trainer: float [tokens], natural logarithm.
        servers: of each server by name, float [tokens].
    """

    trainer: torch.Tensor
    servers: dict[str, torch.Tensor]


def require_served(before: Scores, after: Scores, tolerance_nats: float, key: str) -> float:
    """Compare both sides after the weights were trained and pushed.

    Args:
        before: with the weights before the first update.
        after: with those that were pushed since.
        tolerance_nats: mean absolute difference over the tokens that the noise between two engines explains.
        key: full name of the setting that says so.

    Returns:
        The mean absolute difference of the server that differs most, in nats.

    Raises:
        RolloutServesOtherWeights: a server differs by more; or it gives every token exactly the probability from before
            the update, and the trainer does not.
    """
    largest, has_moved = 0.0, not torch.equal(before.trainer, after.trainer)
    for name, served in after.servers.items():
        difference = (served - after.trainer).abs().mean().item()
        largest = max(largest, difference)
        if not difference <= tolerance_nats:  # a NaN is none
            raise RolloutServesOtherWeights(
                f"after the first push of trained weights the log-probs of rollout server {name} differ from the "
                f"trainer's by {difference:.3g} nats on average over {len(served)} tokens, more than {key}="
                f"{tolerance_nats:g}: it serves other weights. Look at how actor_rollout_ref.rollout.checkpoint_engine "
                "and the model's weight loader name them. Raise the limit where the rollout is quantized; null asks no "
                "more"
            )
        joined_since = name not in before.servers
        if has_moved and not joined_since and torch.equal(served, before.servers[name]):
            raise RolloutServesOtherWeights(
                f"after the first push of trained weights rollout server {name} gives {len(served)} tokens exactly the "
                "log-probs from before the update, and the trainer does not: what is pushed is not what is trained. "
                f"{key}=null asks no more"
            )
    return largest
