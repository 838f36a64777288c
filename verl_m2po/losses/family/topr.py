"""The loss `topr`: tapered off-policy REINFORCE.

See "Tapered Off-Policy REINFORCE" (arXiv:2503.14286).
"""

from dataclasses import dataclass

from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register
from verl_m2po.losses.kernel.settings import check_choice
from verl_m2po.losses.kernel.tokens import Tokens, tapered

LEVELS = ("sequence", "token", "geometric")


@dataclass
class TOPRConfig(BaseConfig):
    """Settings of the loss `topr`.

    Args:
        level: Ratio of current over behaviour policy that tapers negative tokens. "sequence": product over the
            response, as in the paper. "token": the token's own, as in ROLL's code. "geometric": geometric mean over the
            response, as in verl pull request 6986.
    """

    level: str = "sequence"

    def __post_init__(self):
        check_choice(self.level, LEVELS, "topr.level")


def topr_tokens(tokens: Tokens, settings: TOPRConfig) -> TokenLoss:
    """-A log pi where A > 0, and -min(ratio, 1) A log pi elsewhere; the ratio is detached.

    Good responses are imitated however old they are; bad ones are pushed down only as far as the current policy would
    still produce them.
    """
    log_ratio = tokens.log_ratio
    if settings.level != "token":
        log_ratio = tokens.sequence_log_ratio()
    if settings.level == "geometric":
        log_ratio = log_ratio / tokens.lengths()
    weighted = -tapered(tokens.advantages, log_ratio) * tokens.advantages
    return TokenLoss(weighted * tokens.log_prob, weighted, tokens.mask)


register(
    Loss(
        name="topr",
        summary="Tapered off-policy REINFORCE: imitate what is good, push down what the current policy would still say",
        rule=topr_tokens,
        settings=TOPRConfig,
        needs=BEHAVIOUR,
        presets=("topr",),
    )
)
