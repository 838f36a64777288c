"""The loss `oapl`: regress the log ratio of a response onto the KL-optimal advantage.

See OAPL (arXiv:2602.19362), Eq. 2 and 3; the estimator of its advantage is `verl_m2po.advantages.oapl`.
"""

from dataclasses import dataclass

from verl.base_config import BaseConfig

from verl_m2po.losses.kernel import needs
from verl_m2po.losses.kernel.needs import Need
from verl_m2po.losses.kernel.record import Call, Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_boolean, check_number
from verl_m2po.losses.kernel.tokens import Tokens

AGGREGATION = "seq-mean-token-sum"


@dataclass
class OAPLConfig(BaseConfig):
    """Settings of the loss `oapl`.

    Args:
        beta2: Factor of the log ratio, in units of reward per nat. Larger holds the policy closer to the behaviour
            policy.
        unit_gradient: Divide the loss by 2 beta2, so that its gradient starts as large as that of REINFORCE and verl's
            usual gradient clip means the same. false: the paper's scale, whose gradient clip is 1e-3.
    """

    beta2: float = 1e-3
    unit_gradient: bool = False

    def __post_init__(self):
        check_number(self.beta2, "oapl.beta2", above=0)
        check_boolean(self.unit_gradient, "oapl.unit_gradient")


def oapl_tokens(tokens: Tokens, settings: OAPLConfig) -> TokenLoss:
    """(beta2 D - A)^2 averaged over responses, with D the sum of the log ratios of a response and A its advantage.

    There is no ratio and no clip. A group whose rewards are all equal has advantage 0 and still pulls D to 0, so do not
    filter it. The value of each token is its share of the response's loss; its derivative is that of the
    whole loss of the response.
    """
    scale = 1 / (2 * settings.beta2) if settings.unit_gradient else 1.0
    lengths = tokens.lengths()
    advantage = tokens.advantages.sum(-1, keepdim=True) / lengths
    residual = (settings.beta2 * tokens.sequence_log_ratio() - advantage).expand_as(tokens.log_ratio)
    return TokenLoss(scale * residual.square() / lengths, 2 * scale * settings.beta2 * residual, tokens.mask)


def _is_mean_over_responses(call: Call) -> None:
    if call.loss_agg_mode != AGGREGATION:
        raise ValueError(
            f"The loss oapl is a mean over responses: set {needs.AGGREGATION}={AGGREGATION} "
            f"(it is {call.loss_agg_mode})."
        )


register(
    Loss(
        name="oapl",
        summary="Regress the log ratio of a response onto the KL-optimal advantage; no ratio, no clip",
        rule=oapl_tokens,
        settings=OAPLConfig,
        needs=(
            *needs.BEHAVIOUR,
            Need(
                needs.ESTIMATOR,
                ("oapl",),
                "OAPL regresses onto reward minus soft value, which only this estimator gives",
            ),
            Need(needs.AGGREGATION, (AGGREGATION,), "OAPL is a mean over responses"),
        ),
        presets=("oapl",),
        accepts=_is_mean_over_responses,
    )
)
